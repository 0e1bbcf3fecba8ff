// The live plan's passes over a chunk of tokens, stored by column of the vocabulary: exps [columns, rows].
//
// Columns are handled in groups of kGroup, whose block stays in the L2 cache. Sums over columns are made per group and
// added up by the caller in double, so they do not depend on the number of threads.
#pragma once

#include "rows.h"
#include "team.h"

namespace dadpo {
namespace {

inline long groups_of(long columns) { return (columns + kGroup - 1) / kGroup; }

// The first `count` lanes; the others read as zero and are not written.
inline vf load_some(const float* p, long count) {
    if (count >= kLanes) return load<vf>(p);
    vf v{};
    memcpy(&v, p, count * sizeof(float));
    return v;
}
inline void store_some(float* p, vf v, long count) {
    if (count >= kLanes) store(p, v);
    else memcpy(p, &v, count * sizeof(float));
}

// One group of raw products of kLanes tokens -> exp(logit - base) * slope, 0 at the tokens' entries.
struct LiveLanes {
    const Tile& t;
    const Statistics& s;
    const long row, count;  // tokens [row, row + count)
    long cursor[kLanes];  // each token's next entry: ids ascend, and so do groups

    LiveLanes(const Tile& tile, const Statistics& statistics, long first_row, long lanes)
        : t(tile), s(statistics), row(first_row), count(lanes) {
        for (long i = 0; i < count; i++) cursor[i] = find(t, row + i, t.first, t.first).begin;
    }

    void group(long begin, long columns, float* z, float* base_out) {
        const float* bias = t.bias ? t.bias + begin : nullptr;
        const float factor = t.scale * t.inv_temperature, in = t.softcap > 0 ? t.scale / t.softcap : 0;
        const float out = t.softcap * t.inv_temperature;
        for (long j = 0; j < columns; j++) {
            float* p = z + j * t.rows;
            vf x = load_some(p, count);
            if (bias) x += bias[j];
            store_some(p, t.softcap > 0 ? vtanh(x * in) * out : x * factor, count);
        }
        long last[kLanes];
        for (long i = 0; i < count; i++) {
            const int32_t* ids = t.ids + (row + i) * t.entries;
            long e = cursor[i];
            for (; e < t.entries && ids[e] < t.first + begin + columns; e++)
                s.selected[(row + i) * t.entries + e] = z[(ids[e] - t.first - begin) * t.rows + i];
            last[i] = e;
            for (e = cursor[i]; e < last[i]; e++)
                if (t.in_topk[(row + i) * t.entries + e]) z[(ids[e] - t.first - begin) * t.rows + i] = -INFINITY;
        }
        vf max = splat(-INFINITY);
        for (long j = 0; j < columns; j++) max = vmax(load_some(z + j * t.rows, count), max);  // NaN stays
        const vf base = max == -INFINITY ? vf{} : max;
        vf sum{};
        for (long j = 0; j < columns; j++) {
            float* p = z + j * t.rows;
            const vf x = load_some(p, count), e = vexp(x - base);
            sum += e;
            if (t.softcap > 0) {
                const vf y = x * (1 / out);
                store_some(p, e * (1.0f - y * y), count);
            } else {
                store_some(p, e, count);
            }
        }
        for (long i = 0; i < count; i++) {
            const int32_t* ids = t.ids + (row + i) * t.entries;
            for (long e = cursor[i]; e < last[i]; e++) z[(ids[e] - t.first - begin) * t.rows + i] = 0;
            cursor[i] = last[i];
            absorb(s.max + row + i, s.sum + row + i, max[i], sum[i]);
        }
        store_some(base_out + row, base, count);
    }
};

// A tile of raw products z [columns, rows] -> exponentials, each group's from its own base [groups, rows].
inline void live_exponentials(const Tile& t, const Statistics& s, float* z, float* bases) {
    Team::run(t.threads, [&](Team& team, int rank) {
        const auto [begin, end] = team.share(rank, t.rows, 16);
        for (long row = begin; row < end; row += kLanes) {
            LiveLanes lanes(t, s, row, std::min<long>(kLanes, end - row));
            for (long column = 0; column < t.columns; column += kGroup)
                lanes.group(column, std::min(kGroup, t.columns - column), z + column * t.rows + row,
                            bases + column / kGroup * t.rows);
        }
    });
}

// Brings all groups to the base `max` and sums P = share * exps: over tokens per column, and exps^2 per group.
inline void live_columns(const LiveChunk& c, const float* bases, const float* max, const float* share, float* sums,
                         float* energy, float* outside) {
    Team::run(c.threads, [&](Team& team, int rank) {
        const auto [begin, end] = team.share(rank, groups_of(c.columns), 1);
        std::vector<float> factor(c.rows);
        for (long g = begin; g < end; g++) {
            float* squares = outside + g * c.rows;
            for (long i = 0; i < c.rows; i += kLanes) {
                const long count = std::min<long>(kLanes, c.rows - i);
                store_some(factor.data() + i, vexp(load_some(bases + g * c.rows + i, count) - load_some(max + i, count)),
                           count);
                store_some(squares + i, vf{}, count);
            }
            for (long j = g * kGroup; j < std::min(c.columns, (g + 1) * kGroup); j++) {
                float* row = c.exps + j * c.rows;
                vf sum{}, square{};
                for (long i = 0; i < c.rows; i += kLanes) {
                    const long count = std::min<long>(kLanes, c.rows - i);
                    const vf e = load_some(row + i, count) * load_some(factor.data() + i, count);
                    const vf p = e * load_some(share + i, count);
                    store_some(row + i, e, count);
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

// Over the dead columns of every group, per token: sums of exps, of profile * exps and of exps^2 [groups, 3, rows].
inline void live_residuals(const LiveChunk& c, const uint8_t* dead, const float* profile, float* out) {
    Team::run(c.threads, [&](Team& team, int rank) {
        const auto [begin, end] = team.share(rank, groups_of(c.columns), 1);
        for (long g = begin; g < end; g++) {
            float *mass = out + g * 3 * c.rows, *cross = mass + c.rows, *square = cross + c.rows;
            std::fill(mass, mass + 3 * c.rows, 0.0f);
            for (long j = g * kGroup; j < std::min(c.columns, (g + 1) * kGroup); j++) {
                if (!dead[j]) continue;
                const float* row = c.exps + j * c.rows;
                for (long i = 0; i < c.rows; i += kLanes) {
                    const long count = std::min<long>(kLanes, c.rows - i);
                    const vf e = load_some(row + i, count);
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
