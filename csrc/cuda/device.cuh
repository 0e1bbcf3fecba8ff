// Shared device code: mapping a thread block to a row, logits, entries, block reductions, kernel launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../common/online_softmax.h"
#include "passes.h"

#ifndef DADPO_THREADS
#define DADPO_THREADS 128
#endif
#ifndef DADPO_WIDER
#define DADPO_WIDER 1
#endif

namespace dadpo {
namespace cuda {
namespace {

constexpr int kThreads = DADPO_THREADS * DADPO_WIDER, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kVector = 8;  // adjacent columns per thread: one 16-byte access of a 2-byte type, two of float
constexpr int kStep = kThreads * kVector;  // columns per block and chunk; a thread loads all its chunks before it uses one
constexpr int kMaxColumns = DADPO_THREADS * kVector * 8;  // more do not fit into a small block's registers
// Blocks on a multiprocessor that the compiler leaves registers for: left alone, it spills some to fit one more.
template <int kChunks>
constexpr int kResident = (kChunks <= 3 ? 1024 : kChunks <= 6 ? 512 : 384) / kThreads;
constexpr unsigned kAll = 0xffffffffu;  // full warp mask

// Launches `kernel` with kThreads threads per block. An empty grid is skipped: CUDA rejects it.
template <typename Args>
void launch(const Queue& queue, const char* name, void (*kernel)(Args), dim3 grid, const Args& args) {
    if (grid.x == 0 || grid.y == 0) return;
    cudaError_t error = cudaSetDevice(queue.device);  // in this module's own CUDA runtime, separate from PyTorch's
    if (error == cudaSuccess) {
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = dim3(kThreads);
        config.stream = static_cast<cudaStream_t>(queue.stream);
        error = cudaLaunchKernelEx(&config, kernel, args);
    }
    if (error != cudaSuccess) {
        cudaGetLastError();
        throw std::runtime_error(std::string("CUDA kernel ") + name + " was not launched: " + cudaGetErrorString(error));
    }
}

// Blocks needed for `count` items, `each` per block.
inline unsigned blocks(int64_t count, int64_t each) { return static_cast<unsigned>((count + each - 1) / each); }

// Calls `visit` with a number of chunks that hold the tile's rows, the least of an ascending list, as a constant. Rows
// that are not aligned start up to 3 columns late in the first one: see Window.
template <int kFirst, int... kMore, typename Visit>
void for_chunks(const Tile& t, Visit visit) {
    const bool aligned = t.stride % 4 == 0 && reinterpret_cast<uintptr_t>(t.products) % 16 == 0;
    if (int64_t{t.columns} + (aligned ? 0 : 3) <= int64_t{kFirst} * kStep)
        return visit(std::integral_constant<int, kFirst>{});
    if constexpr (sizeof...(kMore) > 0)
        for_chunks<kMore...>(t, visit);
    else
        throw std::runtime_error("a row of " + std::to_string(t.columns) + " columns does not fit into a block of " +
                                 std::to_string(kFirst * kStep));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
// 16 bytes, read or written by one vector instruction.
template <typename T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T item[size];
};
// In PTX, because the compiler merges a plain store with the narrow ones of another branch, and takes it apart.
template <typename T>
__device__ __forceinline__ void store_vector(T* at, const Pack<T>& pack) {
#ifdef __CUDA_ARCH__
    uint4 x;
    memcpy(&x, &pack, sizeof x);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
#else
    *reinterpret_cast<Pack<T>*>(at) = pack;
#endif
}
__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// The columns of a row, cut into vectors. If the row is not aligned to 16 bytes, the first starts before it (by up to 3
// floats, or 7 elements of 2 bytes), so that all but the first and the last are whole and aligned.
struct Window {
    int columns, lead;

    template <typename T>
    __device__ __forceinline__ Window(const T* row, int columns)
        : columns(columns), lead(static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % Pack<T>::size)) {}
    // First column of this thread's vector in `chunk`: consecutive threads read consecutive vectors.
    __device__ __forceinline__ int at(int chunk) const {
        return (chunk * kThreads + static_cast<int>(threadIdx.x)) * kVector - lead;
    }
    __device__ __forceinline__ bool full(int at) const { return 0 <= at && at + kVector <= columns; }
    __device__ __forceinline__ bool holds(int column) const { return 0 <= column && column < columns; }
};

// out [kVector] = row [at, at + kVector) as float; 0 outside the window.
template <typename T>
__device__ __forceinline__ void load(const T* row, const Window& w, int at, float* out) {
    if (w.full(at) && aligned(row + at)) {
#pragma unroll
        for (int p = 0; p < kVector; p += Pack<T>::size) {
            const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(row + at + p);
#pragma unroll
            for (int i = 0; i < Pack<T>::size; i++) out[p + i] = to_float(pack.item[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVector; i++) out[i] = w.holds(at + i) ? to_float(row[at + i]) : 0.0f;
    }
}

// row [at, at + kVector) = in [kVector], inside the window only.
template <typename T>
__device__ __forceinline__ void store(T* row, const Window& w, int at, const float* in) {
    if (w.full(at) && aligned(row + at)) {
#pragma unroll
        for (int p = 0; p < kVector; p += Pack<T>::size) {
            Pack<T> pack;
#pragma unroll
            for (int i = 0; i < Pack<T>::size; i++) pack.item[i] = from_float<T>(in[p + i]);
            store_vector(row + at + p, pack);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kVector; i++)
            if (w.holds(at + i)) row[at + i] = from_float<T>(in[i]);
    }
}

// Logit of a product x: softcap * tanh(scale * x / softcap) / temperature, or scale * x / temperature without softcap.
struct Transform {
    float in, out, inv_out2;
    bool cap;

    __device__ __forceinline__ explicit Transform(const Tile& t)
        : in(t.softcap > 0 ? t.scale / t.softcap : t.scale * t.inv_temperature),
          out(t.softcap * t.inv_temperature),
          inv_out2(1 / (out * out)),
          cap(t.softcap > 0) {}
    __device__ __forceinline__ float logit(float product) const {
        return cap ? out * tanhf(product * in) : product * in;
    }
    __device__ __forceinline__ float slope(float logit) const {  // 1 - tanh^2; 0 for the -inf of a removed column
        return 1.0f - fminf(logit * logit * inv_out2, 1.0f);
    }
};

// z = this thread's logits of the row, -inf past its ends. `row` is the row's products.
template <int kChunks>
__device__ __forceinline__ void load_logits(const Tile& t, const float* row, const Window& w,
                                            float (&z)[kChunks * kVector]) {
#pragma unroll
    for (int c = 0; c < kChunks; c++) load(row, w, w.at(c), z + c * kVector);
    if (t.bias) {
#pragma unroll
        for (int c = 0; c < kChunks; c++) {
            float bias[kVector];
            load(t.bias, w, w.at(c), bias);
#pragma unroll
            for (int i = 0; i < kVector; i++) z[c * kVector + i] += bias[i];
        }
    }
    const Transform transform(t);
#pragma unroll
    for (int i = 0; i < kChunks * kVector; i++) z[i] = transform.logit(z[i]);
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
        if (w.full(w.at(c))) continue;
#pragma unroll
        for (int i = 0; i < kVector; i++)
            if (!w.holds(w.at(c) + i)) z[c * kVector + i] = -INFINITY;
    }
}

// The entries [begin, end) of a row whose ids lie in [first, last). All lanes of a warp count together: a search would
// wait for one load after the other.
struct Hits {
    int begin = 0, end = 0;

    __device__ __forceinline__ Hits(const int32_t* ids, int count, int first, int last) {
        for (int e = threadIdx.x % kWarp; e < count; e += kWarp) {
            begin += ids[e] < first;
            end += ids[e] < last;
        }
        begin = __reduce_add_sync(kAll, begin);
        end = __reduce_add_sync(kAll, end);
    }
};

// selected [entries] = logits of the entries `hits`, from the row's products; `ids` [entries] are the row's.
__device__ __forceinline__ void store_selected(const Tile& t, const float* row, const int32_t* ids, const Hits& hits,
                                               float* selected) {
    const Transform transform(t);
    for (int e = hits.begin + static_cast<int>(threadIdx.x); e < hits.end; e += kThreads) {
        const int column = ids[e] - t.first;
        selected[e] = transform.logit(row[column] + (t.bias ? t.bias[column] : 0.0f));
    }
}

// True for the first of equal ids, so that no two threads write the same column.
__device__ __forceinline__ bool distinct(const int32_t* ids, int e) { return e == 0 || ids[e - 1] != ids[e]; }

struct Max {
    static constexpr float identity = -INFINITY;
    __device__ __forceinline__ static float of(float a, float b) { return fmaxf(a, b); }
};
struct Sum {
    static constexpr float identity = 0.0f;
    __device__ __forceinline__ static float of(float a, float b) { return a + b; }
};

template <typename Op>
__device__ __forceinline__ float warp_reduce(float x) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) x = Op::of(x, __shfl_xor_sync(kAll, x, offset));
    return x;
}

// Reduces over the block; every thread gets the result. `scratch` [kWarps] is in shared memory and must not be reused
// without a barrier after the previous reduction.
template <typename Op>
__device__ __forceinline__ float block_reduce(float x, float* scratch) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    x = warp_reduce<Op>(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_reduce<Op>(lane < kWarps ? scratch[lane] : Op::identity);
}

// Adds a tile's softmax state to the row's running one; one thread of the row's block does it.
__device__ __forceinline__ void absorb(const State& state, int64_t row, float max, float sum) {
    OnlineSoftmax<double> running{state.max[row], state.sum[row]};
    running.merge(max, sum);
    state.max[row] = running.max;
    state.sum[row] = running.sum;
}

// Calls `visit` with a value of the element type, for template dispatch.
template <typename Visit>
void for_type(Type type, Visit visit) {
    switch (type) {
        case Type::f32: return visit(float{});
        case Type::bf16: return visit(__nv_bfloat16{});
        case Type::f16: return visit(__half{});
    }
}

}  // namespace
}  // namespace cuda
}  // namespace dadpo
