// Row passes over a tile of products; each reads the tile once, a thread block a row. Blocks are small, so that a
// multiprocessor has many rows at a time and the waits of one are work of another.

#include "device.cuh"

namespace dadpo {
namespace cuda {
namespace {

template <typename Visit>
void for_rows(const Tile& t, Visit visit) {
    static_assert(8 * kStep == kMaxColumns);
    for_chunks<1, 2, 3, 4, 6, 8>(t, visit);
}

// Sets the logit of `column` to -inf, in the registers of the thread that holds it.
template <int kItems>
__device__ __forceinline__ void remove(const Window& w, int column, float (&z)[kItems]) {
    const int place = column + w.lead, vector = place / kVector;
    if (vector % kThreads != static_cast<int>(threadIdx.x)) return;
    const int item = vector / kThreads * kVector + place % kVector;
    // Unrolled over all items, because a dynamic index would move z to local memory.
#pragma unroll
    for (int i = 0; i < kItems; i++)
        if (i == item) z[i] = -INFINITY;
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, kResident<kChunks>) forward_kernel(Forward a) {
    __shared__ float scratch[2][kWarps];
    const Tile& t = a.tile;
    const int64_t row = blockIdx.x;
    const float* products = t.products + row * t.stride;
    const int32_t* ids = t.entries.ids + row * t.entries.count;
    const float before = a.state.max[row];
    T* exps = a.exps.data ? static_cast<T*>(a.exps.data) + row * a.exps.stride : nullptr;
    float base = exps && before != -INFINITY ? a.bases[row] : 0.0f;
    const Window w(products, t.columns);
    float z[kChunks * kVector];
    load_logits<kChunks>(t, products, w, z);

    // Store the entries' logits and mask the top-k ids out of the tail.
    const Hits hits(ids, t.entries.count, t.first, t.first + t.columns);
    store_selected(t, products, ids, hits, a.selected + row * t.entries.count);
    for (int e = hits.begin; e < hits.end; e++)
        if (a.in_topk[row * t.entries.count + e]) remove(w, ids[e] - t.first, z);

    // The tile's maximum. A row whose tail rises too far above its base gets another.
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kChunks * kVector; i++) max = fmaxf(max, z[i]);
    max = block_reduce<Max>(max, scratch[0]);
    const bool empty = before == -INFINITY, moved = exps && (empty || max > base + a.reach);
    if (moved && !empty) {
        const float factor = expf(base - max);
        for (int j = threadIdx.x; j < t.first; j += kThreads) exps[j] = from_float<T>(to_float(exps[j]) * factor);
    }
    const float relative = reference(max);
    if (moved) base = relative;

    // The sum of exponentials relative to the maximum; relative to the base, they are retained.
    const Transform transform(t);
    const float scale = expf(fminf(relative - base, a.reach));  // the minimum where nothing is finite: 0 * inf is NaN
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
        float e[kVector];
#pragma unroll
        for (int i = 0; i < kVector; i++) {
            e[i] = expf(z[c * kVector + i] - relative);
            sum += e[i];
        }
        if (!exps) continue;
#pragma unroll
        for (int i = 0; i < kVector; i++) e[i] *= transform.cap ? scale * transform.slope(z[c * kVector + i]) : scale;
        store(exps + t.first, w, w.at(c), e);
    }
    sum = block_reduce<Sum>(sum, scratch[1]);
    if (threadIdx.x == 0) {
        absorb(a.state, row, max, sum);
        if (moved) a.bases[row] = base;
    }
}

// dz = c exp(z - base) * slope, `values` at the entries.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads) logit_gradient_kernel(LogitGradient a) {
    const Tile& t = a.tile;
    const int64_t row = blockIdx.x;
    const float* products = t.products + row * t.stride;
    const int32_t* ids = t.entries.ids + row * t.entries.count;
    const Window w(products, t.columns);
    float z[kChunks * kVector];
    load_logits<kChunks>(t, products, w, z);
    const Hits hits(ids, t.entries.count, t.first, t.first + t.columns);

    const float c = a.c[row], base = a.base[row];
    const Transform transform(t);
    T* out = static_cast<T*>(a.dz.data) + row * a.dz.stride;
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
    __syncthreads();  // other threads have stored to the same columns
    const float* values = a.values + row * t.entries.count;
    for (int e = hits.begin + static_cast<int>(threadIdx.x); e < hits.end; e += kThreads)
        if (distinct(ids, e)) out[ids[e] - t.first] = from_float<T>(values[e]);
}

// One warp per row.
template <typename T>
__global__ void __launch_bounds__(kThreads) exchange_kernel(Exchange a) {
    const int lane = threadIdx.x % kWarp;
    const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (row >= a.rows) return;
    const int32_t* ids = a.entries.ids + row * a.entries.count;
    T* matrix = static_cast<T*>(a.matrix.data) + row * a.matrix.stride;
    T* values = static_cast<T*>(a.values) + row * a.entries.count;
    const Hits hits(ids, a.entries.count, 0, a.columns);
    for (int e = hits.begin + lane; e < hits.end; e += kWarp) {
        if (!distinct(ids, e)) continue;
        const T before = matrix[ids[e]];
        matrix[ids[e]] = values[e];
        values[e] = before;
    }
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
    const T* matrix = static_cast<const T*>(a.matrix.data);
    const Window w(matrix, a.columns);
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

int max_columns() { return kMaxColumns; }

void forward(const Queue& queue, const Forward& a) {
    for_rows(a.tile, [&](auto chunks) {
        for_type(a.exps.type, [&](auto type) {
            launch(queue, "forward", forward_kernel<decltype(type), decltype(chunks)::value>, dim3(a.tile.rows), a);
        });
    });
}

void logit_gradient(const Queue& queue, const LogitGradient& a) {
    for_rows(a.tile, [&](auto chunks) {
        for_type(a.dz.type, [&](auto type) {
            launch(queue, "logit_gradient", logit_gradient_kernel<decltype(type), decltype(chunks)::value>,
                   dim3(a.tile.rows), a);
        });
    });
}

void exchange(const Queue& queue, const Exchange& a) {
    for_type(a.matrix.type, [&](auto type) {
        launch(queue, "exchange", exchange_kernel<decltype(type)>, dim3(blocks(a.rows, kWarps)), a);
    });
}

void column_sums(const Queue& queue, const ColumnSums& a) {
    for_type(a.matrix.type, [&](auto type) {
        launch(queue, "column_sums", column_sums_kernel<decltype(type)>, dim3(blocks(a.columns, kStrip)), a);
    });
}

}  // namespace cuda
}  // namespace dadpo
