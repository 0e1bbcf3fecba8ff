// Turns retained exponentials into the gradient of the logits.
//
// With one factor per row, `factors * exps` equals that gradient except at the row's entries. Once `values / factor` is
// written there, both matrix products can read the exponentials in place. In float16 the quotient can overflow, so
// `scale_retained` writes the gradient to a separate buffer instead.

#include "device.cuh"

namespace dadpo {
namespace cuda {
namespace {

// dz / exps outside the entries: the exponentials are scaled and relative to `bases`, the gradient to `base`.
template <typename T>
__device__ __forceinline__ float factor_of(const RetainedGradient& a, int64_t row) {
    return a.c[row] * expf(a.bases[row * a.bases_stride] - a.base[row]) / kRetainedScale<T>;
}

// Grid (rows, segments).
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_retained_kernel(RetainedGradient a) {
    const int64_t row = blockIdx.x;
    const T* exps = static_cast<const T*>(a.retained.exps) + row * a.retained.stride;
    T* dz = static_cast<T*>(a.dz) + row * a.dz_stride;
    const Window w(exps, a.columns, blockIdx.y, gridDim.y);
    const float factor = factor_of<T>(a, row);
    float x[kItems];
#pragma unroll
    for (int c = 0; c < kChunks; c++) load(exps, w, w.at(c), x + c * kVector);
#pragma unroll
    for (int i = 0; i < kItems; i++) x[i] *= factor;
#pragma unroll
    for (int c = 0; c < kChunks; c++) store(dz, w, w.at(c), x + c * kVector);
    overwrite(dz, w, a.entries.ids + row * a.entries.count, a.entries.count, a.first,
              a.values + row * a.entries.count);
}

// One warp per row. A factor that is 0 or tiny relative to the values is raised to 2^-100 of the largest, so that the
// quotients stay finite. The exponentials are at most 1, so the other columns' gradient is overstated by at most that.
template <typename T>
__global__ void __launch_bounds__(kThreads) enter_values_kernel(RetainedGradient a) {
    const int lane = threadIdx.x % kWarp;
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (row >= a.rows) return;
    const int32_t* ids = a.entries.ids + row * a.entries.count;
    const float* values = a.values + row * a.entries.count;
    const Hits hits(ids, a.entries.count, a.first, a.first + a.columns);
    // The factor, raised if necessary.
    float largest = 0;
    for (int e = hits.begin + lane; e < hits.end; e += kWarp) largest = fmaxf(largest, fabsf(values[e]));
    largest = warp_reduce<Max>(largest);
    const float least = largest > 0 ? fmaxf(largest * 0x1p-100f, FLT_MIN) : 0.0f;
    float factor = factor_of<T>(a, row);
    if (fabsf(factor) < least) factor = factor < 0 ? -least : least;
    if (lane == 0) a.factors[row] = factor;

    // Swap the entries: exponentials out to `saved`, quotients in.
    T* exps = static_cast<T*>(a.retained.exps) + row * a.retained.stride;
    T* saved = static_cast<T*>(a.saved) + row * a.entries.count;
    for (int e = hits.begin + lane; e < hits.end; e += kWarp) {
        if (!distinct(ids, e)) continue;
        T& place = exps[ids[e] - a.first];
        saved[e] = place;
        place = from_float<T>(values[e] == 0 ? 0.0f : values[e] / factor);
    }
}

// One warp per row.
template <typename T>
__global__ void __launch_bounds__(kThreads) restore_kernel(RetainedGradient a) {
    const int lane = threadIdx.x % kWarp;
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (row >= a.rows) return;
    const int32_t* ids = a.entries.ids + row * a.entries.count;
    const Hits hits(ids, a.entries.count, a.first, a.first + a.columns);
    T* exps = static_cast<T*>(a.retained.exps) + row * a.retained.stride;
    const T* saved = static_cast<const T*>(a.saved) + row * a.entries.count;
    for (int e = hits.begin + lane; e < hits.end; e += kWarp)
        if (distinct(ids, e)) exps[ids[e] - a.first] = saved[e];
}

}  // namespace

void scale_retained(const Queue& queue, const RetainedGradient& a) {
    for_type(a.retained.type, [&](auto type) {
        // An unaligned row needs up to 7 more columns: see Window.
        launch(queue, "scale_retained", scale_retained_kernel<decltype(type)>,
               dim3(a.rows, blocks(a.columns + kVector, kCapacity)), a);
    });
}

void enter_values(const Queue& queue, const RetainedGradient& a) {
    for_type(a.retained.type, [&](auto type) {
        launch(queue, "enter_values", enter_values_kernel<decltype(type)>, dim3(blocks(a.rows, kWarps)), a);
    });
}

void restore(const Queue& queue, const RetainedGradient& a) {
    for_type(a.retained.type, [&](auto type) {
        launch(queue, "restore", restore_kernel<decltype(type)>, dim3(blocks(a.rows, kWarps)), a);
    });
}

}  // namespace cuda
}  // namespace dadpo
