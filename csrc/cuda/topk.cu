// The k largest logits of a row, tile by tile: an exact radix select in registers.
//
// Floats are mapped to integers of the same order. The k-th largest of the kept logits and the tile together is
// determined bit by bit, with up to 32 counts, without sorting and without a candidate list. Ties go to the lowest ids:
// kept logits are stored in ascending order of ids and tiles come in ascending order, so ranks among equals are prefix
// sums.

#include <climits>

#define DADPO_WIDER 4  // keys are counted up to 32 times: the fewer a thread has, the better
#include "device.cuh"

namespace dadpo {
namespace cuda {
namespace {

constexpr int kSlots = 4;  // kept logits per thread
constexpr int kLeast = INT_MIN;  // below the key of -inf

// An integer key in the same order as the float; NaN is the largest and -0 equals 0.
__device__ __forceinline__ int key_of(float z) {
    if (z != z) return INT_MAX;
    const int bits = __float_as_int(z == 0 ? 0.0f : z);
    return bits ^ ((bits >> 31) & INT_MAX);
}
__device__ __forceinline__ float logit_of(int key) { return __int_as_float(key ^ ((key >> 31) & INT_MAX)); }

// Sum of x over the block; every thread gets it. `scratch` [kWarps] is in shared memory.
__device__ __forceinline__ int block_count(int x, int* scratch) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    x = __reduce_add_sync(kAll, x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return __reduce_add_sync(kAll, lane < kWarps ? scratch[lane] : 0);
}

// Exclusive prefix sum of x over the threads of the block; `total` is the sum over all.
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

// Two counts packed in one integer, for one scan: keys above the threshold in the low 16 bits, equal keys in the high.
__device__ __forceinline__ unsigned against(int key, int threshold) {
    return key > threshold ? 1u : (key == threshold ? 0x10000u : 0u);
}

// Assigns output slots in order, to all keys above the threshold and to the first `room` keys that equal it.
struct Places {
    int room;
    unsigned before = 0;  // packed counts of the keys before this one

    __device__ __forceinline__ int place(unsigned count) {  // the slot of a key with packed count `count`; -1: not kept
        const int above = before & 0xffff, equal = before >> 16;
        before += count;
        const bool kept = count == 1u || (count != 0 && equal < room);
        return kept ? above + (equal < room ? equal : room) : -1;
    }
};

// One block per row.
template <int kChunks>
__global__ void __launch_bounds__(kThreads, kResident<kChunks>) topk_kernel(TopK a) {
    constexpr int kItems = kChunks * kVector;
    // Two of each, used alternately: the barrier inside one use separates the uses of the other, so none is added.
    __shared__ int counts[2][kWarps];
    __shared__ unsigned scans[2][kWarps];
    __shared__ float scratch[2][kWarps];
    // Load the tile's logits and the kept ones, as keys.
    const Tile& t = a.tile;
    const int64_t row = blockIdx.x;
    const float* products = t.products + row * t.stride;
    const int32_t* ids = t.entries.ids + row * t.entries.count;
    float* best_values = a.values + row * a.capacity;
    int32_t* best_ids = a.ids + row * a.capacity;
    const Window w(products, t.columns);
    float z[kItems];
    load_logits<kChunks>(t, products, w, z);
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

    // Radix select: the threshold becomes the largest key that at least `keep` keys reach, from the top bit down.
    int threshold = kLeast;
    for (int bit = 31; bit >= 0; bit--) {
        // XOR, because the first step must clear the sign bit to raise the threshold; all lower bits are still 0.
        const int raised = threshold ^ static_cast<int>(1u << bit);
        const int n = count([&](int x) { return x >= raised; });
        if (n >= a.keep) threshold = raised;
        if (n == a.keep) break;
    }
    Places places{a.keep - count([&](int x) { return x > threshold; })};

    // Assign slots to what stays: previously kept logits first, then columns by chunk, thread and item, so ids ascend.
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
    __syncthreads();  // all kept logits are read before the first is overwritten
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

    // The softmax state of all that is not kept.
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
    if (threadIdx.x == 0) absorb(a.state, row, max, sum);
}

}  // namespace

int max_k() { return kSlots * kThreads; }

void topk(const Queue& queue, const TopK& a) {
    if (a.keep > max_k()) throw std::runtime_error("k=" + std::to_string(a.keep) + " exceeds " + std::to_string(max_k()));
    static_assert(2 * kStep == kMaxColumns);
    for_chunks<1, 2>(a.tile, [&](auto chunks) {
        launch(queue, "topk", topk_kernel<decltype(chunks)::value>, dim3(a.tile.rows), a);
    });
}

}  // namespace cuda
}  // namespace dadpo
