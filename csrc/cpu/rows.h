// Row passes over one group of kGroup columns, whose logits a GEMM has just left in cache. `column` is the group's
// first column in the vocabulary; `z`, `slope`, `exps` and `dz` are [kGroup], one row's part of the group.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/online_softmax.h"
#include "gemm.h"
#include "passes.h"

namespace dadpo {
namespace {

constexpr long kBlock = 96;  // rows per block: their operands and one group of their logits fit in the L2 cache
constexpr long kGroupVectors = kGroup / kLanes;

// The range of one row's entries whose ids lie in [begin, end); ids ascend along a row.
struct Hits {
    long begin, end;
};
inline Hits find(const Tile& t, long row, long begin, long end) {
    const int32_t* ids = t.ids + row * t.entries;
    const int32_t* lo = std::lower_bound(ids, ids + t.entries, static_cast<int32_t>(begin));
    const int32_t* hi = std::lower_bound(lo, ids + t.entries, static_cast<int32_t>(end));
    return {lo - ids, hi - ids};
}

// Turns products into logits in place; columns past `valid` become -inf. With a softcap, `slope` = 1 - tanh^2.
inline void finish_logits(const Tile& t, long column, long valid, float* z, float* slope) {
    for (long j = valid; j < kGroup; j++) z[j] = -INFINITY;
    if (t.bias)
        for (long j = 0; j < valid; j++) z[j] += t.bias[column - t.first + j];
    if (t.softcap > 0) {
        const float in = t.scale / t.softcap, out = t.softcap * t.inv_temperature;
        for (long v = 0; v < kGroupVectors; v++) {
            const vf y = vtanh(load<vf>(z + v * kLanes) * in);
            store(z + v * kLanes, y * out);
            store(slope + v * kLanes, 1.0f - y * y);
        }
        for (long j = valid; j < kGroup; j++) z[j] = -INFINITY;
    } else if (t.scale * t.inv_temperature != 1.0f) {
        const float factor = t.scale * t.inv_temperature;
        for (long v = 0; v < kGroupVectors; v++) store(z + v * kLanes, load<vf>(z + v * kLanes) * factor);
        for (long j = valid; j < kGroup; j++) z[j] = -INFINITY;  // a negative scale turns -inf into inf
    }
}

inline float group_max(const float* z) {  // two accumulators hide the latency
    vf m0 = load<vf>(z), m1 = load<vf>(z + kLanes);
    for (long v = 2; v < kGroupVectors; v += 2) {
        m0 = vmax(m0, load<vf>(z + v * kLanes));
        m1 = vmax(m1, load<vf>(z + (v + 1) * kLanes));
    }
    return horizontal_max(vmax(m0, m1));
}

inline float group_sum(const float* z, float base) {  // of exp(z - base)
    vf s0{}, s1{};
    for (long v = 0; v < kGroupVectors; v += 2) {
        s0 += vexp(load<vf>(z + v * kLanes) - base);
        s1 += vexp(load<vf>(z + (v + 1) * kLanes) - base);
    }
    return horizontal_sum(s0 + s1);
}

// Merges a group into the running state; `group_sum` is the sum of its exponentials relative to `group_max`.
inline void absorb(float* max, double* sum, float group_max, float group_sum) {
    OnlineSoftmax<double> state{*max, *sum};
    state.merge(group_max, group_sum);
    *max = state.max;
    *sum = state.sum;
}

// Stores the entries' logits, masks the top-k ids, and merges the rest into the row's state. With `exps`, also retains
// exp(z - base) * slope. The base is the group's maximum: nothing overflows, and the largest exponential is exact.
template <typename T>
inline void statistics_row(const Tile& t, const Statistics& s, long row, long column, float* z, const float* slope,
                           T* exps, float* base) {
    const Hits hits = find(t, row, column, column + kGroup);
    for (long e = hits.begin; e < hits.end; e++) {
        const long at = row * t.entries + e;
        s.selected[at] = z[t.ids[at] - column];
    }
    for (long e = hits.begin; e < hits.end; e++) {
        const long at = row * t.entries + e;
        if (t.in_topk[at]) z[t.ids[at] - column] = -INFINITY;
    }
    const float max = group_max(z), group_base = reference(max);
    vf sum{};
    if (base) *base = group_base;
    for (long v = 0; v < kGroupVectors; v++) {
        const vf e = vexp(load<vf>(z + v * kLanes) - group_base);
        sum += e;
        if (exps) store_as(exps + v * kLanes, t.softcap > 0 ? e * load<vf>(slope + v * kLanes) : e);
    }
    absorb(s.max + row, s.sum + row, max, horizontal_sum(sum));
}

// Overwrites the entries of a group of dz with their exact values.
template <typename U>
inline void overwrite_entries(const Tile& t, const Gradient& g, long row, long column, U* dz) {
    const Hits hits = find(t, row, column, column + kGroup);
    for (long e = hits.begin; e < hits.end; e++) {
        const long at = row * t.entries + e;
        alignas(64) U rounded[kLanes];
        store_as(rounded, splat(g.values[at]));
        dz[t.ids[at] - column] = rounded[0];
    }
}

// dz = c exp(z - base) * slope, from recomputed logits. A row with an empty tail has c = 0.
template <typename U>
inline void gradient_row(const Tile& t, const Gradient& g, long row, long column, const float* z, const float* slope,
                         U* dz) {
    const float c = g.coefficient[row], base = g.base[row];
    for (long v = 0; v < kGroupVectors; v++) {
        vf d = vexp(load<vf>(z + v * kLanes) - base) * c;
        if (t.softcap > 0) d *= load<vf>(slope + v * kLanes);
        store_as(dz + v * kLanes, d);
    }
    overwrite_entries(t, g, row, column, dz);
}

// The same from retained exponentials, which are relative to the group's `base`.
template <typename T, typename U>
inline void gradient_row_retained(const Tile& t, const Gradient& g, long row, long column, const T* exps, float base,
                                  U* dz) {
    // A group without a tail has base 0, which may be far above; its exponentials are all 0.
    const float factor = g.coefficient[row] * expf(std::min(base - g.base[row], 0.0f));
    for (long v = 0; v < kGroupVectors; v++) store_as(dz + v * kLanes, load_as(exps + v * kLanes) * factor);
    overwrite_entries(t, g, row, column, dz);
}

// An integer that sorts by descending value, ties by ascending id: a total order even with NaN. -0 equals 0.
inline uint64_t candidate_key(float value, int32_t id) {
    value += 0.0f;  // -0 becomes 0
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t(~rising) << 32 | uint32_t(id);
}
inline float candidate_value(uint64_t key) {  // inverse of candidate_key
    const uint32_t rising = ~uint32_t(key >> 32), bits = rising >> 31 ? rising & 0x7fffffffu : ~rising;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Candidates for one row's top k: values above the k-th largest at the last cut. They are unsorted, and cut back to k
// when the buffer is full and at the end of a tile. Columns come in ascending order and the comparison is strict, so
// ties go to the lowest ids. Values that are rejected or cut belong to the tail and are added to its state, so nothing
// has to be subtracted later.
struct Best {
    const Candidates& c;
    const long row;
    float* const values = c.values + row * c.capacity;
    int32_t* const ids = c.ids + row * c.capacity;
    int32_t& count = c.counts[row];

    void cut() {
        if (count <= c.k) return;
        // Partition around the k-th candidate.
        std::vector<uint64_t> keys(count);
        for (long i = 0; i < count; i++) keys[i] = candidate_key(values[i], ids[i]);
        std::nth_element(keys.begin(), keys.begin() + c.k, keys.end());
        for (long i = 0; i < count; i++) values[i] = candidate_value(keys[i]);
        for (long i = 0; i < c.k; i++) ids[i] = static_cast<int32_t>(keys[i]);
        // Add the dropped values to the tail's state.
        for (long i = c.k; i < count; i += kGroup) {
            alignas(64) float dropped[kGroup];
            for (long j = 0; j < kGroup; j++) dropped[j] = i + j < count ? values[i + j] : -INFINITY;
            const float max = group_max(dropped);
            absorb(c.max + row, c.sum + row, max, group_sum(dropped, reference(max)));
        }
        count = static_cast<int32_t>(c.k);
    }
    // The smallest of the k largest at the last cut, which are the first k candidates.
    float threshold() const {
        if (count < c.k) return -INFINITY;
        vf least = splat(INFINITY);
        long i = 0;
        for (; i + kLanes <= c.k; i += kLanes) least = -vmax(-least, -load<vf>(values + i));
        float smallest = -horizontal_max(-least);
        for (; i < c.k; i++) smallest = std::min(smallest, values[i]);
        return smallest;
    }
};

// Moves candidates out of one group of logits and adds the rest to the tail's state. After the tile's `last` group, at
// most k candidates are left.
inline void topk_row(const Candidates& c, long row, long column, long valid, bool last, float* z) {
    constexpr long kScan = 4 * kLanes;  // columns that are skipped together if none exceeds the threshold
    Best best{c, row};
    float threshold = c.k ? best.threshold() : INFINITY;
    for (long begin = 0; begin < valid; begin += kScan) {
        if (best.count >= c.k) {
            vf most = load<vf>(z + begin);
            for (long v = 1; v < kScan / kLanes; v++) most = vmax(most, load<vf>(z + begin + v * kLanes));
            if (!(horizontal_max(most) > threshold)) continue;
        }
        // Until there are k candidates, every logit but NaN is one.
        for (long j = begin; j < std::min(begin + kScan, valid); j++) {
            if (best.count < c.k ? z[j] != z[j] : !(z[j] > threshold)) continue;
            best.values[best.count] = z[j];
            best.ids[best.count++] = static_cast<int32_t>(column + j);
            z[j] = -INFINITY;
            if (best.count == c.capacity) {
                best.cut();
                threshold = best.threshold();
            }
        }
    }
    if (last) best.cut();
    const float max = group_max(z);
    absorb(c.max + row, c.sum + row, max, group_sum(z, reference(max)));
}

}  // namespace
}  // namespace dadpo
