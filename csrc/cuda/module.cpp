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
    m.attr("COLUMNS") = max_columns();
    m.attr("MAX_K") = max_k();

    const py::module_local local;  // tests load builds of this module side by side
    py::enum_<Type>(m, "Type", local).value("f32", Type::f32).value("bf16", Type::bf16).value("f16", Type::f16);
    py::class_<Queue>(m, "Queue", local).def(py::init([](int device, uintptr_t stream) {
        return Queue{device, at<void>(stream)};
    }));
    py::class_<Tile>(m, "Tile", local).def(
        py::init([](uintptr_t products, int64_t rows, int64_t stride, int32_t first, int32_t columns, uintptr_t bias,
                    float scale, float softcap, float inv_temperature, uintptr_t ids, int32_t entries) {
            return Tile{at<float>(products), rows, stride, first, columns, at<float>(bias), scale, softcap,
                        inv_temperature, {at<int32_t>(ids), entries}};
        }),
        py::kw_only(), py::arg("products"), py::arg("rows"), py::arg("stride"), py::arg("first"), py::arg("columns"),
        py::arg("bias"), py::arg("scale"), py::arg("softcap"), py::arg("inv_temperature"), py::arg("ids"),
        py::arg("entries"));
    py::class_<Matrix>(m, "Matrix", local).def(py::init([](uintptr_t data, int64_t stride, Type type) {
        return Matrix{at<void>(data), stride, type};
    }));

    m.def("forward", [](const Queue& queue, const Tile& tile, uintptr_t in_topk, uintptr_t selected, uintptr_t max,
                        uintptr_t sum, const Matrix& exps, uintptr_t bases, float reach) {
        forward(queue, {tile, at<uint8_t>(in_topk), at<float>(selected), {at<float>(max), at<double>(sum)}, exps,
                        at<float>(bases), reach});
    });
    m.def("logit_gradient", [](const Queue& queue, const Tile& tile, uintptr_t c, uintptr_t base, uintptr_t values,
                               const Matrix& dz) {
        logit_gradient(queue, {tile, at<float>(c), at<float>(base), at<float>(values), dz});
    });
    m.def("exchange", [](const Queue& queue, const Matrix& matrix, int64_t rows, int32_t columns, uintptr_t ids,
                         int32_t entries, uintptr_t values) {
        exchange(queue, {matrix, rows, columns, {at<int32_t>(ids), entries}, at<void>(values)});
    });
    m.def("column_sums", [](const Queue& queue, const Matrix& matrix, int64_t rows, int32_t columns, uintptr_t factors,
                            uintptr_t out) {
        column_sums(queue, {matrix, rows, columns, at<float>(factors), at<float>(out)});
    });
    m.def("topk", [](const Queue& queue, const Tile& tile, uintptr_t selected, uintptr_t values, uintptr_t ids,
                     int64_t capacity, int32_t have, int32_t keep, uintptr_t max, uintptr_t sum) {
        topk(queue, {tile, at<float>(selected), at<float>(values), at<int32_t>(ids), capacity, have, keep,
                     {at<float>(max), at<double>(sum)}});
    });
}
