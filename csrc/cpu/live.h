// The live plan's passes over a chunk of tokens. Its exponentials are stored transposed: exps [columns, rows] float32.
//
// Columns are handled in groups of kGroup, whose data stays in the L2 cache. Sums over columns are computed per group
// and added by the caller in double, so they do not depend on the number of threads.
#pragma once

#include "rows.h"
#include "team.h"

namespace dadpo {
namespace {

inline long groups_of(long columns) { return (columns + kGroup - 1) / kGroup; }

// One group of columns for kLanes tokens: products -> exp(logit - base) * slope, 0 at the tokens' entries.
inline void live_lanes(const Tile& t, const Statistics& s, long row,  // first token
                       long begin, long columns,  // the group, relative to the tile
                       float* z, long ld,  // [columns, kLanes] products, overwritten by logits; row stride ld
                       float* out,  // [columns, count] written, row stride t.rows
                       float* base_out, float* sum_out) {  // [count] written: base, and sum of exponentials
    // Products to logits, in place.
    const long count = std::min<long>(kLanes, t.rows - row);
    const float* bias = t.bias ? t.bias + begin : nullptr;
    const float factor = t.scale * t.inv_temperature, in = t.softcap > 0 ? t.scale / t.softcap : 0;
    const float cap = t.softcap * t.inv_temperature, per_cap = t.softcap > 0 ? 1 / cap : 0;
    if (bias || t.softcap > 0 || factor != 1)
        for (long j = 0; j < columns; j++) {
            const vf x = load<vf>(z + j * ld) + (bias ? bias[j] : 0);
            store(z + j * ld, t.softcap > 0 ? vtanh(x * in) * cap : x * factor);
        }
    // Store the entries' logits and mask the top-k ids out of the tail.
    const long first = t.first + begin;
    Hits hits[kLanes];
    for (long i = 0; i < count; i++) {
        hits[i] = find(t, row + i, first, first + columns);
        const int32_t* ids = t.ids + (row + i) * t.entries;
        for (long e = hits[i].begin; e < hits[i].end; e++)
            s.selected[(row + i) * t.entries + e] = z[(ids[e] - first) * ld + i];
        for (long e = hits[i].begin; e < hits[i].end; e++)
            if (t.in_topk[(row + i) * t.entries + e]) z[(ids[e] - first) * ld + i] = -INFINITY;
    }
    // Online softmax over the group, one token per lane.
    vf max = splat(-INFINITY);
    for (long j = 0; j < columns; j++) max = vmax(load<vf>(z + j * ld), max);  // skips NaN; the sum propagates it
    const vf base = max == -INFINITY ? vf{} : max;
    vf sum{};
    for (long j = 0; j < columns; j++) {
        const vf x = load<vf>(z + j * ld), e = vexp(x - base), y = x * per_cap;
        sum += e;
        store_some(out + j * t.rows, t.softcap > 0 ? e * (1.0f - y * y) : e, count);
    }
    for (long i = 0; i < count; i++)
        for (long e = hits[i].begin; e < hits[i].end; e++)
            out[(t.ids[(row + i) * t.entries + e] - first) * t.rows + i] = 0;
    store_some(base_out, max, count);
    store_some(sum_out, sum, count);
}

// The chunk's exponentials over the whole tile. Each group and token has its own base: the group's maximum, -inf if the
// group has no finite logit. The weight is A (float32 is read in place) and the few tokens are packed as B. A group's
// products stay in the L2 cache until they are exponentials.
template <typename T>
void live_exponentials(const Tile& t, const Statistics& s,
                       float* exps,  // [columns, rows] written
                       float* bases) {  // [groups, rows] written
    using U = OperandOf<T>;
    const long depth = Units<U>::count(t.width), groups = groups_of(t.columns), panels = panels_of(t.rows);
    constexpr bool in_place = std::is_same_v<T, float>;
    const long copied = operand_stride<U>(t.width);  // units
    const long stride = in_place ? t.hidden_stride : copied * Units<U>::per;  // of hidden, in elements
    const long weight_stride = in_place ? t.weight_stride : copied;  // in units
    // Pack the tokens once, for all threads.
    std::vector<U> hidden_space(in_place ? 0 : t.rows * stride);
    std::vector<uint32_t> packed(panels * depth * kPanel);
    std::vector<float> sums(groups * t.rows);
    const U* hidden = operand_rows(static_cast<const T*>(t.hidden), t.hidden_stride, t.rows, t.width, hidden_space.data());
    for (long p = 0; p < panels; p++)
        pack_panel_transposed<U>(hidden + p * kPanel * stride, stride, t.rows - p * kPanel, t.width,
                                 packed.data() + p * depth * kPanel);
    Team::run(t.threads, [&](Team& team, int rank) {
        // Each rank computes its share of the groups.
        std::vector<U> weight_space(in_place ? 0 : kGroup * copied * Units<U>::per);
        std::vector<float> z(kGroup * panels * kPanel);
        const auto [begin, end] = team.share(rank, groups, 1);
        for (long g = begin; g < end; g++) {
            const long columns = std::min(kGroup, t.columns - g * kGroup), ld = panels * kPanel;
            const U* weight = operand_rows(static_cast<const T*>(t.weight) + g * kGroup * t.weight_stride,
                                           t.weight_stride, columns, t.width, weight_space.data());
            for (long i = 0; i < columns; i += kBlock) {
                const uint32_t* block = reinterpret_cast<const uint32_t*>(weight) + i * weight_stride;
                const long count = std::min(kBlock, columns - i);
                // Prefetch the next block of the weight only where it is contiguous and in place: copies are in cache
                // already, and with a larger row stride the gaps would be fetched too.
                const long rest = in_place && weight_stride == depth ? std::min(t.columns, end * kGroup) : 0;
                const long left = std::clamp(rest - g * kGroup - i - count, 0L, kBlock);
                gemm<U>(block, by_rows<U>(weight_stride), packed.data(), depth, depth, count, panels,
                        z.data() + i * ld, ld, false, block + count * weight_stride, left * weight_stride);
            }
            for (long row = 0; row < t.rows; row += kLanes)
                live_lanes(t, s, row, g * kGroup, columns, z.data() + row, ld, exps + g * kGroup * t.rows + row,
                           bases + g * t.rows + row, sums.data() + g * t.rows + row);
        }
        team.barrier();
        // Merge the groups' states per token, in ascending order, so that the sum does not depend on the thread count.
        const auto [first, last] = team.share(rank, t.rows, 16);
        for (long row = first; row < last; row += kLanes) {
            const long count = std::min<long>(kLanes, last - row);
            vf max = splat(-INFINITY);
            for (long g = 0; g < groups; g++) max = vmax(load_some(bases + g * t.rows + row, count), max);
            const vf base = max == -INFINITY ? vf{} : max;
            double sum[kLanes] = {};
            for (long g = 0; g < groups; g++) {
                const vf group_base = load_some(bases + g * t.rows + row, count);
                const vf part = vexp(group_base - base) * load_some(sums.data() + g * t.rows + row, count);
                for (long i = 0; i < count; i++) sum[i] += part[i];
            }
            store_some(s.max + row, max, count);
            memcpy(s.sum + row, sum, count * sizeof(double));
        }
    });
}

// Replaces each group's base by the factor that rescales its exps to the base `max`. Then sums P = share * factor *
// exps and P^2 over tokens, and (factor * exps)^2 over the columns of a group. `exps` is not changed.
inline void live_columns(const LiveChunk& c,
                         float* factors,  // [groups, rows] bases on entry, factors exp(base - max) on return
                         const float* max, const float* share,  // [rows]
                         float* sums, float* energy,  // [columns] written: sums over tokens of P and of P^2
                         float* outside) {  // [groups, rows] written: sums of (factor * exps)^2
    Team::run(c.threads, [&](Team& team, int rank) {
        const auto [begin, end] = team.share(rank, groups_of(c.columns), 1);
        for (long g = begin; g < end; g++) {
            // Factors, and zeroed accumulators.
            float *squares = outside + g * c.rows, *factor = factors + g * c.rows;
            for (long i = 0; i < c.rows; i += kLanes) {
                const long count = std::min<long>(kLanes, c.rows - i);
                store_some(factor + i, vexp(load_some(factor + i, count) - load_some(max + i, count)), count);
                store_some(squares + i, vf{}, count);
            }
            for (long j = g * kGroup; j < std::min(c.columns, (g + 1) * kGroup); j++) {
                const float* row = c.exps + j * c.rows;
                vf sum{}, square{};
                for (long i = 0; i < c.rows; i += kLanes) {
                    const long count = std::min<long>(kLanes, c.rows - i);
                    const vf e = load_some(row + i, count) * load_some(factor + i, count);
                    const vf p = e * load_some(share + i, count);
                    store_some(squares + i, load_some(squares + i, count) + e * e, count);
                    sum += p;
                    square += p * p;
                }
                sums[j] = horizontal_sum(sum);
                energy[j] = horizontal_sum(square);
            }
        }
    });
}

// Sums over the dead columns of each group, per token, with e = factor * exps: of e, of profile * e and of e^2.
inline void live_residuals(const LiveChunk& c,
                           const float* factors,  // [groups, rows], from `live_columns`
                           const uint8_t* dead, const float* profile,  // [columns] bool and float
                           float* out) {  // [groups, 3, rows] written
    Team::run(c.threads, [&](Team& team, int rank) {
        const auto [begin, end] = team.share(rank, groups_of(c.columns), 1);
        for (long g = begin; g < end; g++) {
            float *mass = out + g * 3 * c.rows, *cross = mass + c.rows, *square = cross + c.rows;
            const float* factor = factors + g * c.rows;
            std::fill(mass, mass + 3 * c.rows, 0.0f);
            for (long j = g * kGroup; j < std::min(c.columns, (g + 1) * kGroup); j++) {
                if (!dead[j]) continue;
                const float* row = c.exps + j * c.rows;
                for (long i = 0; i < c.rows; i += kLanes) {
                    const long count = std::min<long>(kLanes, c.rows - i);
                    const vf e = load_some(row + i, count) * load_some(factor + i, count);
                    store_some(mass + i, load_some(mass + i, count) + e, count);
                    store_some(cross + i, load_some(cross + i, count) + e * profile[j], count);
                    store_some(square + i, load_some(square + i, count) + e * e, count);
                }
            }
        }
    });
}

}  // namespace
}  // namespace dadpo
