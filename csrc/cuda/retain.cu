// From retained exponentials to the gradient of the logits.
//
// With one factor per row, `factors * exps` is that gradient everywhere but at the row's entries, and both products read
// the exponentials as they lie once `values / factor` stands at the entries. In float16 that quotient overflows, so there
// the gradient is written out in one pass.

#include "device.cuh"

namespace dadpo {
namespace cuda {
namespace {

template <typename T>
__device__ __forceinline__ float factor_of(const RetainedGradient& a, int64_t row) {
    return a.c[row] * expf(a.bases[row * a.bases_stride] - a.base[row]) / kRetainedScale<T>;
}

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

// A factor may be tiny beside the values, or 0. It is then raised to 2^-100 of the largest, so that the quotients stay
// finite; the exponentials, at most 1, it overstates by no more than that.
template <typename T>
__global__ void __launch_bounds__(kThreads) enter_values_kernel(RetainedGradient a) {
    const int lane = threadIdx.x % kWarp;
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (row >= a.rows) return;
    const int32_t* ids = a.entries.ids + row * a.entries.count;
    const float* values = a.values + row * a.entries.count;
    const Hits hits(ids, a.entries.count, a.first, a.first + a.columns);
    float largest = 0;
    for (int e = hits.begin + lane; e < hits.end; e += kWarp) largest = fmaxf(largest, fabsf(values[e]));
    largest = warp_reduce<Max>(largest);
    const float least = largest > 0 ? fmaxf(largest * 0x1p-100f, FLT_MIN) : 0.0f;
    float factor = factor_of<T>(a, row);
    if (fabsf(factor) < least) factor = factor < 0 ? -least : least;
    if (lane == 0) a.factors[row] = factor;

    T* exps = static_cast<T*>(a.retained.exps) + row * a.retained.stride;
    T* saved = static_cast<T*>(a.saved) + row * a.entries.count;
    for (int e = hits.begin + lane; e < hits.end; e += kWarp) {
        if (!distinct(ids, e)) continue;
        T& place = exps[ids[e] - a.first];
        saved[e] = place;
        place = from_float<T>(values[e] == 0 ? 0.0f : values[e] / factor);
    }
}

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
        // Up to 7 columns more than the row has: see Window.
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
