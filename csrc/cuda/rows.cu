// Row passes over a tile of products; each reads the tile once. Unless noted, the grid is (rows, segments).

#include "device.cuh"

namespace dadpo {
namespace cuda {
namespace {

// Sets the logit of `column` to -inf, in the registers of the thread that holds it.
__device__ __forceinline__ void remove(const Window& w, int column, float (&z)[kItems]) {
    const int vector = (column - w.origin) / kVector;
    if (vector % kThreads != static_cast<int>(threadIdx.x)) return;
    const int item = vector / kThreads * kVector + (column - w.origin) % kVector;
    // Unrolled over all items, because a dynamic index would move z to local memory.
#pragma unroll
    for (int i = 0; i < kItems; i++)
        if (i == item) z[i] = -INFINITY;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(Statistics a) {
    __shared__ float scratch[2][kWarps];
    const Tile& t = a.tile;
    const int64_t row = blockIdx.x;
    const float* products = t.products + row * t.stride;
    const int32_t* ids = t.entries.ids + row * t.entries.count;
    const Window w(products, t.columns, blockIdx.y, gridDim.y);
    float z[kItems];
    load_logits(t, products, w, z);

    // Store the entries' logits and mask the top-k ids out of the tail.
    const Hits hits(ids, t.entries.count, t.first + w.begin, t.first + w.end);
    store_selected(t, products, ids, hits, a.selected + row * t.entries.count);
    for (int e = hits.begin; e < hits.end; e++)
        if (a.in_topk[row * t.entries.count + e]) remove(w, ids[e] - t.first, z);

    // The segment's maximum, then the sum of exponentials relative to it, retaining them if requested.
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kItems; i++) max = fmaxf(max, z[i]);
    max = block_reduce<Max>(max, scratch[0]);
    const float base = reference(max);
    const Transform transform(t);
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
        float e[kVector];
#pragma unroll
        for (int i = 0; i < kVector; i++) {
            e[i] = expf(z[c * kVector + i] - base);
            sum += e[i];
        }
        if (!a.retained.exps) continue;
#pragma unroll
        for (int i = 0; i < kVector; i++)
            e[i] *= transform.cap ? kRetainedScale<T> * transform.slope(z[c * kVector + i]) : kRetainedScale<T>;
        store(static_cast<T*>(a.retained.exps) + row * a.retained.stride, w, w.at(c), e);
    }
    sum = block_reduce<Sum>(sum, scratch[1]);
    if (threadIdx.x == 0) {
        const int64_t at = blockIdx.y * t.rows + row;
        a.partials.max[at] = max;
        a.partials.sum[at] = sum;
    }
}

// One thread per row merges the row's segments in order.
__global__ void __launch_bounds__(kThreads) absorb_kernel(Absorb a) {
    const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (row >= a.rows) return;
    OnlineSoftmax<double> state{a.max[row], a.sum[row]};
    float largest = -INFINITY;
    for (int64_t s = 0; s < a.segments; s++) {
        const float max = a.partials.max[s * a.rows + row];
        state.merge(max, a.partials.sum[s * a.rows + row]);
        largest = fmaxf(largest, max);
    }
    a.max[row] = state.max;
    a.sum[row] = state.sum;
    if (a.bases) a.bases[row * a.bases_stride] = largest;
}

// dz = c exp(z - base) * slope, `values` at the entries. Without c, retained exponentials, 0 at the entries.
template <typename T>
__global__ void __launch_bounds__(kThreads) logit_gradient_kernel(LogitGradient a) {
    const Tile& t = a.tile;
    const int64_t row = blockIdx.x;
    const float* products = t.products + row * t.stride;
    const Window w(products, t.columns, blockIdx.y, gridDim.y);
    float z[kItems];
    load_logits(t, products, w, z);

    const float c = a.c ? a.c[row] : kRetainedScale<T>, base = reference(a.base[row * a.base_stride]);
    const Transform transform(t);
    T* out = static_cast<T*>(a.out.exps) + row * a.out.stride;
#pragma unroll
    for (int k = 0; k < kChunks; k++) {
        float dz[kVector];
#pragma unroll
        for (int i = 0; i < kVector; i++) {
            const float logit = z[k * kVector + i];
            dz[i] = c * expf(logit - base);
            if (transform.cap) dz[i] *= transform.slope(logit);
        }
        store(out, w, w.at(k), dz);
    }
    overwrite(out, w, t.entries.ids + row * t.entries.count, t.entries.count, t.first,
              a.values ? a.values + row * t.entries.count : nullptr);
}

constexpr int kStrip = kWarp * kVector;  // columns per block of column_sums

// The shared-memory bank of column `lane * kVector + i`. Each i rotates it by 4, so that neither the writes of a warp
// (one i, all lanes) nor its reads (adjacent columns) have bank conflicts.
DADPO_HD constexpr int bank(int i, int lane) { return (lane + 4 * i) % kWarp; }
constexpr unsigned banks_of_a_read() {
    unsigned banks = 0;
    for (int j = 0; j < kWarp; j++) banks |= 1u << bank(j % kVector, j / kVector);
    return banks;
}
static_assert(banks_of_a_read() == kAll, "columns side by side share a bank");

// One block per strip of kStrip columns. Warps sum interleaved rows; their partial sums are added in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kThreads) column_sums_kernel(ColumnSums a) {
    __shared__ float part[kWarps][kVector][kWarp];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int first = blockIdx.x * kStrip, at = first + lane * kVector;
    const T* matrix = static_cast<const T*>(a.matrix.exps);
    Window w(matrix, a.columns, 0, 1);
    float sums[kVector] = {};
#pragma unroll 4
    for (int64_t row = warp; row < a.rows; row += kWarps) {
        float x[kVector];
        load(matrix + row * a.matrix.stride, w, at, x);
        const float factor = a.factors ? a.factors[row] : 1.0f;
#pragma unroll
        for (int i = 0; i < kVector; i++) sums[i] += factor * x[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; i++) part[warp][i][bank(i, lane)] = sums[i];
    __syncthreads();
    for (int j = threadIdx.x; j < kStrip && first + j < a.columns; j += kThreads) {
        float sum = 0;
        for (int k = 0; k < kWarps; k++) sum += part[k][j % kVector][bank(j % kVector, j / kVector)];
        a.out[first + j] = sum;
    }
}

}  // namespace

int columns_per_segment() { return kCapacity; }

void statistics(const Queue& queue, const Statistics& a) {
    check(a.tile);
    if (a.retained.exps && a.tile.segments > 1)
        throw std::runtime_error("exponentials are retained by statistics for rows of one segment only");
    for_type(a.retained.type, [&](auto type) {
        launch(queue, "statistics", statistics_kernel<decltype(type)>, dim3(a.tile.rows, a.tile.segments), a);
    });
}

void absorb(const Queue& queue, const Absorb& a) {
    launch(queue, "absorb", absorb_kernel, dim3(blocks(a.rows, kThreads)), a);
}

void logit_gradient(const Queue& queue, const LogitGradient& a) {
    check(a.tile);
    for_type(a.out.type, [&](auto type) {
        launch(queue, "logit_gradient", logit_gradient_kernel<decltype(type)>, dim3(a.tile.rows, a.tile.segments), a);
    });
}

void column_sums(const Queue& queue, const ColumnSums& a) {
    for_type(a.matrix.type, [&](auto type) {
        launch(queue, "column_sums", column_sums_kernel<decltype(type)>, dim3(blocks(a.columns, kStrip)), a);
    });
}

}  // namespace cuda
}  // namespace dadpo
