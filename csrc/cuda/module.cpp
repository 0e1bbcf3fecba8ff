// Python binding. It takes addresses, sizes and strides and does not depend on PyTorch. Python validates all arguments.

#include <pybind11/pybind11.h>

#include "passes.h"

namespace py = pybind11;
using namespace dadpo::cuda;

namespace {

template <typename U>
U* at(uintptr_t address) {
    return reinterpret_cast<U*>(address);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Row passes of the CUDA backend. Takes addresses; use dadpo_kernels.ops.backends.cuda.";
    m.attr("ARCHITECTURES") = DADPO_CUDA_ARCHITECTURES;
    m.attr("COLUMNS") = columns_per_segment();
    m.attr("MAX_K") = max_k();

    const py::module_local local;  // tests load builds of this module side by side
    py::enum_<Type>(m, "Type", local).value("f32", Type::f32).value("bf16", Type::bf16).value("f16", Type::f16);
    py::class_<Queue>(m, "Queue", local).def(py::init([](int device, uintptr_t stream) {
        return Queue{device, at<void>(stream)};
    }));
    py::class_<Tile>(m, "Tile", local).def(
        py::init([](uintptr_t products, int64_t rows, int64_t stride, int32_t first, int32_t columns, uintptr_t bias,
                    float scale, float softcap, float inv_temperature, uintptr_t ids, int32_t entries,
                    int32_t segments) {
            return Tile{at<float>(products), rows, stride, first, columns, at<float>(bias), scale, softcap,
                        inv_temperature, {at<int32_t>(ids), entries}, segments};
        }),
        py::kw_only(), py::arg("products"), py::arg("rows"), py::arg("stride"), py::arg("first"), py::arg("columns"),
        py::arg("bias"), py::arg("scale"), py::arg("softcap"), py::arg("inv_temperature"), py::arg("ids"),
        py::arg("entries"), py::arg("segments"));
    py::class_<Retained>(m, "Retained", local).def(py::init([](uintptr_t exps, int64_t stride, Type type) {
        return Retained{at<void>(exps), stride, type};
    }));
    py::class_<RetainedGradient>(m, "RetainedGradient", local)
        .def(py::init([](const Retained& retained, int64_t rows, int32_t first, int32_t columns, uintptr_t ids,
                         int32_t entries, uintptr_t c, uintptr_t base, uintptr_t values, uintptr_t bases,
                         int64_t bases_stride, uintptr_t dz, int64_t dz_stride, uintptr_t factors, uintptr_t saved) {
                 return RetainedGradient{retained, rows, first, columns, {at<int32_t>(ids), entries}, at<float>(c),
                                         at<float>(base), at<float>(values), at<float>(bases), bases_stride,
                                         at<void>(dz), dz_stride, at<float>(factors), at<void>(saved)};
             }),
             py::kw_only(), py::arg("retained"), py::arg("rows"), py::arg("first"), py::arg("columns"), py::arg("ids"),
             py::arg("entries"), py::arg("c"), py::arg("base"), py::arg("values"), py::arg("bases"),
             py::arg("bases_stride"), py::arg("dz"), py::arg("dz_stride"), py::arg("factors"), py::arg("saved"));

    m.def("statistics", [](const Queue& queue, const Tile& tile, uintptr_t in_topk, uintptr_t selected, uintptr_t max,
                           uintptr_t sum, const Retained& retained) {
        statistics(queue, {tile, at<uint8_t>(in_topk), at<float>(selected), {at<float>(max), at<float>(sum)}, retained});
    });
    m.def("absorb", [](const Queue& queue, uintptr_t part_max, uintptr_t part_sum, int64_t rows, int32_t segments,
                       uintptr_t max, uintptr_t sum, uintptr_t bases, int64_t bases_stride) {
        absorb(queue, {{at<float>(part_max), at<float>(part_sum)}, rows, segments, at<float>(max), at<double>(sum),
                       at<float>(bases), bases_stride});
    });
    m.def("logit_gradient", [](const Queue& queue, const Tile& tile, uintptr_t c, uintptr_t base, int64_t base_stride,
                               uintptr_t values, const Retained& out) {
        logit_gradient(queue, {tile, at<float>(c), at<float>(base), base_stride, at<float>(values), out});
    });
    m.def("scale_retained", &scale_retained);
    m.def("enter_values", &enter_values);
    m.def("restore", &restore);
    m.def("column_sums", [](const Queue& queue, const Retained& matrix, int64_t rows, int32_t columns, uintptr_t factors,
                            uintptr_t out) {
        column_sums(queue, {matrix, rows, columns, at<float>(factors), at<float>(out)});
    });
    m.def("topk", [](const Queue& queue, const Tile& tile, uintptr_t selected, uintptr_t values, uintptr_t ids,
                     int64_t capacity, int32_t have, int32_t keep, uintptr_t max, uintptr_t sum) {
        topk(queue, {tile, at<float>(selected), at<float>(values), at<int32_t>(ids), capacity, have, keep,
                     {at<float>(max), at<float>(sum)}});
    });
}
