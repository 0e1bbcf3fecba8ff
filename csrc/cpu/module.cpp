// Python binding. It takes addresses, sizes and strides and does not depend on PyTorch. Python validates all arguments.

#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "openmp.h"
#include "passes.h"

namespace py = pybind11;
using namespace dadpo;

namespace dadpo {
#define DADPO_DECLARE(isa) const Passes* passes_##isa();
DADPO_FOR_EACH_ISA(DADPO_DECLARE)
}  // namespace dadpo

namespace {

template <typename U>
U* at(uintptr_t address) {
    return reinterpret_cast<U*>(address);
}

// Why AMX's bfloat16 products cannot be used here; empty if they can. Linux gives a process the registers when it asks
// (Documentation/arch/x86/xstate.rst), for all of its threads.
std::string ask_for_amx() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kSaved = 3u << 17;  // XTILECFG and XTILEDATA of XCR0
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kBf16 | kTiles)) != (kBf16 | kTiles))
        return "the processor has none";
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return "the system does not save its registers";
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & kSaved) != kSaved) return "the system does not save its registers";
    if (syscall(SYS_arch_prctl, kRequest, kTileData))
        return std::string("the system refuses its registers: ") + std::strerror(errno);
    return "";
#else
    return "it needs Linux on x86-64";
#endif
}
const std::string& amx_obstacle() {
    static const std::string reason = ask_for_amx();
    return reason;
}

// Whether this processor supports the instruction set.
bool supported(const std::string& isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    const bool bf16 = v4 && __builtin_cpu_supports("avx512bf16");
    if (isa == "v4_amx") return bf16 && amx_obstacle().empty();
    if (isa == "v4_bf16") return bf16;
    if (isa == "v4") return v4;
    if (isa == "v3") return v3;
    if (isa == "v2") return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
#endif
    return isa == "generic";
}

struct Variant {
    const char* name;
    const Passes* (*get)();
};
constexpr Variant kVariants[] = {
#define DADPO_LIST(isa) {#isa, passes_##isa},
    DADPO_FOR_EACH_ISA(DADPO_LIST)};

// Advises huge pages for a freshly allocated buffer. Without them, its first pass spends about a tenth of its time on
// page faults, one per 4 KiB. Only a hint: it has no effect where the system does not support huge pages.
void prefer_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20, begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

const Passes* active = nullptr;  // of the instruction set in use

py::list available() {  // instruction sets, best first
    py::list names;
    for (const auto& v : kVariants)
        if (supported(v.name)) names.append(v.name);
    return names;
}

void use(const std::string& isa) {
    for (const auto& v : kVariants)
        if (isa == v.name && supported(isa)) {
            active = v.get();
            return;
        }
    throw py::value_error("instruction set '" + isa + "' is not in this build or not in this processor; available: " +
                          py::str(available()).cast<std::string>());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Row passes and matrix products of the CPU backend. Takes addresses; use dadpo_kernels.ops.backends.cpu.";

    py::class_<Tile>(m, "Tile", py::module_local()).def(
        py::init([](uintptr_t hidden, long rows, long width, long hidden_stride, uintptr_t weight, long weight_stride,
                    uintptr_t bias, long first, long columns, uintptr_t ids, uintptr_t in_topk, long entries, float scale,
                    float softcap, float inv_temperature, bool bf16, int threads) {
            return Tile{at<void>(hidden), rows, width, hidden_stride, at<void>(weight), weight_stride, at<float>(bias),
                        first, columns, at<int32_t>(ids), at<uint8_t>(in_topk), entries, scale, softcap,
                        inv_temperature, bf16, threads};
        }),
        py::kw_only(), py::arg("hidden"), py::arg("rows"), py::arg("width"), py::arg("hidden_stride"), py::arg("weight"),
        py::arg("weight_stride"), py::arg("bias"), py::arg("first"), py::arg("columns"), py::arg("ids"),
        py::arg("in_topk"), py::arg("entries"), py::arg("scale"), py::arg("softcap"), py::arg("inv_temperature"),
        py::arg("bf16"), py::arg("threads"));

    m.attr("GROUP") = kGroup;
    m.def("available", &available);
    m.def("use", &use);
    m.def("prefer_huge_pages", &prefer_huge_pages);
    m.def("shares_threads", &OpenMP::available);
    m.def("amx_obstacle", &amx_obstacle);
    m.def("active", [] { return active->name; });
    m.def("panel", [] { return active->panel; });
    m.def("multiplies_bf16", [] { return active->multiplies_bf16; });
    m.def("workspace_bytes", [](const Tile& t, bool logits, bool grad_hidden, bool keep_dz) {
        return active->workspace_bytes(t, logits, grad_hidden, keep_dz);
    });
    m.def("pack_hidden", [](const Tile& t, uintptr_t out) { active->pack_hidden(t, at<uint32_t>(out)); },
          py::call_guard<py::gil_scoped_release>());
    m.def(
        "forward",
        [](const Tile& t, uintptr_t max, uintptr_t sum, uintptr_t selected, uintptr_t exps, uintptr_t bases,
           uintptr_t workspace) {
            active->forward(t, {at<float>(max), at<double>(sum), at<float>(selected)},
                               {at<void>(exps), at<float>(bases)}, at<char>(workspace));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "backward",
        [](const Tile& t, uintptr_t coefficient, uintptr_t base, uintptr_t values, uintptr_t hidden,
           uintptr_t weight, long weight_stride, uintptr_t bias, uintptr_t exps, uintptr_t bases,
           uintptr_t packed_hidden, uintptr_t workspace) {
            active->backward(t,
                             {at<float>(coefficient), at<float>(base), at<float>(values), at<float>(hidden),
                              at<void>(weight), weight_stride, at<float>(bias)},
                             {at<void>(exps), at<float>(bases)}, at<uint32_t>(packed_hidden), at<char>(workspace));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "topk",
        [](const Tile& t, uintptr_t max, uintptr_t sum, uintptr_t selected, uintptr_t values, uintptr_t ids,
           uintptr_t counts, long k, long capacity, uintptr_t workspace) {
            active->topk(t, {nullptr, nullptr, at<float>(selected)},
                         {at<float>(max), at<double>(sum), at<float>(values), at<int32_t>(ids), at<int32_t>(counts), k,
                          capacity},
                         at<char>(workspace));
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "live_exponentials",
        [](const Tile& t, uintptr_t max, uintptr_t sum, uintptr_t selected, uintptr_t exps, uintptr_t bases) {
            active->live_exponentials(t, {at<float>(max), at<double>(sum), at<float>(selected)}, at<float>(exps),
                                      at<float>(bases));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "live_columns",
        [](uintptr_t exps, long columns, long rows, int threads, uintptr_t factors, uintptr_t max, uintptr_t share,
           uintptr_t sums, uintptr_t energy, uintptr_t outside) {
            active->live_columns({at<float>(exps), columns, rows, threads}, at<float>(factors), at<float>(max),
                                 at<float>(share), at<float>(sums), at<float>(energy), at<float>(outside));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "live_residuals",
        [](uintptr_t exps, long columns, long rows, int threads, uintptr_t factors, uintptr_t dead, uintptr_t profile,
           uintptr_t out) {
            active->live_residuals({at<float>(exps), columns, rows, threads}, at<float>(factors), at<uint8_t>(dead),
                                   at<float>(profile), at<float>(out));
        },
        py::call_guard<py::gil_scoped_release>());

    py::class_<LiveGradient>(m, "LiveGradient", py::module_local())
        .def(py::init([](uintptr_t dz, uintptr_t live, long columns, long rows, uintptr_t hidden, long hidden_stride,
                         uintptr_t weight, long weight_stride, long width, uintptr_t grad_hidden,
                         long grad_hidden_stride, uintptr_t grad_weight, long grad_weight_stride, long first, bool bf16,
                         int threads) {
                 return LiveGradient{at<void>(dz), at<int64_t>(live), columns, rows, at<void>(hidden), hidden_stride,
                                     at<void>(weight), weight_stride, width, at<float>(grad_hidden),
                                     grad_hidden_stride, at<float>(grad_weight), grad_weight_stride, first, bf16,
                                     threads};
             }),
             py::kw_only(), py::arg("dz"), py::arg("live"), py::arg("columns"), py::arg("rows"), py::arg("hidden"),
             py::arg("hidden_stride"), py::arg("weight"), py::arg("weight_stride"), py::arg("width"),
             py::arg("grad_hidden"), py::arg("grad_hidden_stride"), py::arg("grad_weight"),
             py::arg("grad_weight_stride"), py::arg("first"), py::arg("bf16"), py::arg("threads"));
    m.def("live_workspace_bytes", [](const LiveGradient& g) { return active->live_workspace_bytes(g); });
    m.def(
        "live_gradient", [](const LiveGradient& g, uintptr_t workspace) { active->live_gradient(g, at<char>(workspace)); },
        py::call_guard<py::gil_scoped_release>());

    const py::list names = available();
    if (names.empty()) throw py::import_error("this processor supports none of the instruction sets of this build");
    use(names[0].cast<std::string>());
}
