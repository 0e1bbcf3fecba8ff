// The best k logits of a row, tile by tile: a radix select in registers, exact.
//
// Floats are compared as integers of the same order. The k-th largest of {kept so far} and {tile} is found bit by bit:
// up to 32 counts, no sort, no candidate list. Among equals the lowest ids win: what is kept stands in ascending order of
// ids and tiles ascend, so that ranks among equals are running counts.

#include <climits>

#include "device.cuh"

namespace dadpo {
namespace cuda {
namespace {

constexpr int kSlots = 4;  // kept logits a thread holds
constexpr int kLeast = INT_MIN;  // no float's key

// NaN is the largest, and -0 equals 0.
__device__ __forceinline__ int key_of(float z) {
    if (z != z) return INT_MAX;
    const int bits = __float_as_int(z == 0 ? 0.0f : z);
    return bits ^ ((bits >> 31) & INT_MAX);
}
__device__ __forceinline__ float logit_of(int key) { return __int_as_float(key ^ ((key >> 31) & INT_MAX)); }

// Over the block; every thread gets the sum.
__device__ __forceinline__ int block_count(int x, int* scratch) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    x = __reduce_add_sync(kAll, x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return __reduce_add_sync(kAll, lane < kWarps ? scratch[lane] : 0);
}

// Sum of x over the threads before this one; `total` over all.
__device__ __forceinline__ unsigned block_scan(unsigned x, unsigned& total, unsigned* scratch) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    unsigned inclusive = x;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const unsigned before = __shfl_up_sync(kAll, inclusive, offset);
        if (lane >= offset) inclusive += before;
    }
    if (lane == kWarp - 1) scratch[warp] = inclusive;
    __syncthreads();
    const unsigned of_warp = lane < kWarps ? scratch[lane] : 0;
    total = __reduce_add_sync(kAll, of_warp);
    return __reduce_add_sync(kAll, lane < warp ? of_warp : 0) + inclusive - x;
}

// Two counts in one number: of what lies above the threshold, and (in units of 2^16) of what equals it.
__device__ __forceinline__ unsigned against(int key, int threshold) {
    return key > threshold ? 1u : (key == threshold ? 0x10000u : 0u);
}

// Hands out places in order: what lies above the threshold gets one, and of its equals the first `room`.
struct Places {
    int room;
    unsigned before = 0;

    __device__ __forceinline__ int place(unsigned count) {  // -1: none
        const int above = before & 0xffff, equal = before >> 16;
        before += count;
        const bool kept = count == 1u || (count != 0 && equal < room);
        return kept ? above + (equal < room ? equal : room) : -1;
    }
};

__global__ void __launch_bounds__(kThreads) topk_kernel(TopK a) {
    // Two of each: a barrier between two uses of the same one is the barrier of the use between.
    __shared__ int counts[2][kWarps];
    __shared__ unsigned scans[2][kWarps];
    __shared__ float scratch[2][kWarps];
    const Tile& t = a.tile;
    const int64_t row = blockIdx.x;
    const float* products = t.products + row * t.stride;
    const int32_t* ids = t.entries.ids + row * t.entries.count;
    float* best_values = a.values + row * a.capacity;
    int32_t* best_ids = a.ids + row * a.capacity;
    const Window w(products, t.columns, 0, 1);
    float z[kItems];
    load_logits(t, products, w, z);
    store_selected(t, products, ids, Hits(ids, t.entries.count, t.first, t.first + t.columns),
                   a.selected + row * t.entries.count);

    int key[kItems], old_key[kSlots];
#pragma unroll
    for (int i = 0; i < kItems; i++)
        key[i] = w.holds(w.at(i / kVector) + i % kVector) ? key_of(z[i]) : kLeast;
#pragma unroll
    for (int s = 0; s < kSlots; s++) {
        const int slot = s * kThreads + threadIdx.x;
        old_key[s] = slot < a.have ? key_of(best_values[slot]) : kLeast;
    }
    int round = 0;
    auto count = [&](auto counts_in) {
        int n = 0;
#pragma unroll
        for (int i = 0; i < kItems; i++) n += counts_in(key[i]);
#pragma unroll
        for (int s = 0; s < kSlots; s++) n += counts_in(old_key[s]);
        return block_count(n, counts[round++ % 2]);
    };

    int threshold = kLeast;
    for (int bit = 31; bit >= 0; bit--) {
        // The top bit of a signed number is set where the number is small, so that raising it clears it.
        const int raised = threshold ^ static_cast<int>(1u << bit);
        const int n = count([&](int x) { return x >= raised; });
        if (n >= a.keep) threshold = raised;
        if (n == a.keep) break;
    }
    Places places{a.keep - count([&](int x) { return x > threshold; })};

    // What stays, in order: kept ones by slot, then columns by chunk, thread and item.
    unsigned kept = 0, old_kept = 0, start = 0, total;
    int old_id[kSlots], old_place[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; s++) {
        old_place[s] = -1;
        if (s * kThreads >= a.have) continue;
        const int slot = s * kThreads + threadIdx.x;
        if (slot < a.have) old_id[s] = best_ids[slot];
        const unsigned x = against(old_key[s], threshold);
        places.before = start + block_scan(x, total, scans[s % 2]);
        old_place[s] = places.place(x);
        start += total;
    }
    __syncthreads();  // every old one is read before the first is overwritten
#pragma unroll
    for (int s = 0; s < kSlots; s++) {
        if (old_place[s] < 0) continue;
        old_kept |= 1u << s;
        best_values[old_place[s]] = logit_of(old_key[s]);
        best_ids[old_place[s]] = old_id[s];
    }
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
        unsigned x = 0;
#pragma unroll
        for (int i = 0; i < kVector; i++) x += against(key[c * kVector + i], threshold);
        places.before = start + block_scan(x, total, scans[c % 2]);
        start += total;
#pragma unroll
        for (int i = 0; i < kVector; i++) {
            const int item = c * kVector + i, place = places.place(against(key[item], threshold));
            if (place < 0) continue;
            kept |= 1u << item;
            best_values[place] = logit_of(key[item]);
            best_ids[place] = t.first + w.at(c) + i;
        }
    }

    float max = -INFINITY;
    auto for_rest = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < kItems; i++)
            if (key[i] != kLeast && !(kept >> i & 1)) visit(logit_of(key[i]));
#pragma unroll
        for (int s = 0; s < kSlots; s++)
            if (old_key[s] != kLeast && !(old_kept >> s & 1)) visit(logit_of(old_key[s]));
    };
    for_rest([&](float x) { max = fmaxf(max, x); });
    max = block_reduce<Max>(max, scratch[0]);
    float sum = 0;
    for_rest([&](float x) { sum += expf(x - reference(max)); });
    sum = block_reduce<Sum>(sum, scratch[1]);
    if (threadIdx.x == 0) {
        a.partials.max[row] = max;
        a.partials.sum[row] = sum;
    }
}

}  // namespace

int max_k() { return kSlots * kThreads; }

void topk(const Queue& queue, const TopK& a) {
    check(a.tile);
    if (a.tile.segments != 1) throw std::runtime_error("top-k takes rows of one segment");
    if (a.keep > max_k()) throw std::runtime_error("k=" + std::to_string(a.keep) + " exceeds " + std::to_string(max_k()));
    launch(queue, "topk", topk_kernel, dim3(a.tile.rows), a);
}

}  // namespace cuda
}  // namespace dadpo
