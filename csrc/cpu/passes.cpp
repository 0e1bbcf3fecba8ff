// One tile of the vocabulary: product, row pass, products. Compiled once per instruction set (DADPO_ISA names it).
//
// Rows are split over threads in fixed contiguous shares and each row sees its columns in the same order whatever the
// share, so results do not depend on the number of threads. The weight gradient is split over columns.

#include "live.h"
#include "rows.h"
#include "team.h"

namespace dadpo {
namespace {

constexpr long kBlock = 96;  // rows at a time: their operands and a group of their logits fit in the L2 cache

long groups(const Tile& t) { return (t.columns + kGroup - 1) / kGroup; }
long panels(long columns) { return (columns + kPanel - 1) / kPanel; }

// Carves aligned pieces from the caller's workspace; with a null base it only counts.
class Arena {
public:
    explicit Arena(char* base) : base_(base) {}
    template <typename U>
    U* take(long count) {
        U* piece = reinterpret_cast<U*>(base_ + used_);
        used_ += (count * static_cast<long>(sizeof(U)) + 63) / 64 * 64;
        return piece;
    }
    long used() const { return used_; }

private:
    char* base_;
    long used_ = 0;
};

struct Workspace {
    uint32_t *logits_b = nullptr, *hidden_b = nullptr;  // the tile's weight as B of h W^T, and as B of dz W
    void* dz = nullptr;  // [rows, groups * kGroup], kept for the weight gradient
    struct Local {
        float *z, *slope, *c;
        uint32_t* a;
        void* dz;
    };
    std::vector<Local> local;

    Workspace(const Tile& t, char* base, bool logits, bool grad_hidden, bool keep_dz) : arena(base) {
        const long per = t.bf16 ? 2 : 1, depth = (t.width + per - 1) / per, padded = groups(t) * kGroup;
        if (logits) logits_b = arena.take<uint32_t>(padded * depth);
        if (grad_hidden) hidden_b = arena.take<uint32_t>(panels(t.width) * kPanel * (padded / per));
        if (keep_dz) dz = arena.take<uint32_t>(t.rows * (padded / per));
        for (int i = 0; i < t.threads; i++) {
            Local l{};
            l.z = arena.take<float>(kBlock * kGroup);
            l.slope = arena.take<float>(kBlock * kGroup);
            if (!keep_dz) l.dz = arena.take<float>(kBlock * kGroup);
            if (keep_dz) {
                l.c = arena.take<float>(kBlock * panels(t.width) * kPanel);
                l.a = arena.take<uint32_t>(kBlock * kInner);
            }
            local.push_back(l);
        }
    }
    Arena arena;
};

template <typename T>
void pack_logits_operand(const Tile& t, const Team& team, int rank, uint32_t* out) {
    const T* weight = static_cast<const T*>(t.weight);
    const long depth = Units<T>::count(t.width);
    const auto [begin, end] = team.share(rank, groups(t) * kGroup / kPanel, 1);
    for (long p = begin; p < end; p++) {
        const long column = p * kPanel;
        pack_panel_transposed(weight + column * t.weight_stride, t.weight_stride, t.columns - column, t.width,
                              out + p * depth * kPanel);
    }
}

// Logits of rows [row, row + count) in group `g`: z [count, kGroup], finished; with a softcap also their slopes.
template <typename T>
void group_logits(const Tile& t, long row, long count, long g, const uint32_t* packed, const Workspace::Local& l) {
    const long depth = Units<T>::count(t.width), stride = t.hidden_stride / Units<T>::per;
    const uint32_t* a = static_cast<const uint32_t*>(t.hidden) + row * stride;
    gemm<T>(a, kRows * stride, stride, 1, packed + g * kGroup * depth, depth, depth, count, kGroup / kPanel, l.z, kGroup,
            false);
    const long valid = std::min(kGroup, t.columns - g * kGroup);
    for (long i = 0; i < count; i++)
        finish_logits(t, t.first + g * kGroup, valid, l.z + i * kGroup, l.slope + i * kGroup);
}

// Visits this rank's rows in blocks, and every group of columns for each block.
template <typename Visit>
void for_blocks(const Tile& t, const Team& team, int rank, Visit visit) {
    const auto [begin, end] = team.share(rank, t.rows, kRows);
    for (long row = begin; row < end; row += kBlock)
        for (long g = 0; g < groups(t); g++) visit(row, std::min(kBlock, end - row), g);
}

template <typename T>
void statistics(const Tile& t, const Statistics& s, const Retained& r, Workspace& w) {
    Team::run(t.threads, [&](Team& team, int rank) {
        pack_logits_operand<T>(t, team, rank, w.logits_b);
        team.barrier();
        const auto& l = w.local[rank];
        for_blocks(t, team, rank, [&](long row, long count, long g) {
            group_logits<T>(t, row, count, g, w.logits_b, l);
            for (long i = 0; i < count; i++) {
                const long at = (row + i) * groups(t) + g;
                T* exps = r.exps ? static_cast<T*>(r.exps) + at * kGroup : nullptr;
                statistics_row(t, s, row + i, t.first + g * kGroup, l.z + i * kGroup, l.slope + i * kGroup, exps,
                               r.exps ? r.bases + at : nullptr);
            }
        });
    });
}

// dW [columns, width] = dz^T hidden for this rank's columns, accumulated in float32 over all rows and rounded once.
template <typename T>
void weight_gradient(const Tile& t, const Gradient& g, const Team& team, int rank, const T* dz,
                     const uint32_t* packed_hidden, const Workspace::Local& l) {
    constexpr int per = Units<T>::per;
    const long padded = groups(t) * kGroup, depth = Units<T>::count(t.rows), wide = panels(t.width) * kPanel;
    const auto [begin, end] = team.share(rank, t.columns, kRows);
    for (long column = begin; g.weight && column < end; column += kBlock) {
        const long count = std::min(kBlock, end - column);
        for (long k = 0; k < depth; k += kInner) {
            const long part = std::min(kInner, depth - k);
            for (long i = 0; i < count; i += kRows)
                pack_block_transposed(dz + k * per * padded + column + i, padded, count - i,
                                      std::min(part * per, t.rows - k * per), l.a + i * part);
            gemm<T>(l.a, kRows * part, 1, kRows, packed_hidden + k * kPanel, depth, part, count, wide / kPanel, l.c,
                    wide, k > 0);
        }
        for (long i = 0; i < count; i++) {
            T* out = static_cast<T*>(g.weight) + (column + i) * g.weight_stride;
            const float* c = l.c + i * wide;
            long j = 0;
            for (; j + kLanes <= t.width; j += kLanes) store_as(out + j, load<vf>(c + j));
            T last[kLanes];
            if (j < t.width) {
                store_as(last, load<vf>(c + j));
                memcpy(out + j, last, (t.width - j) * sizeof(T));
            }
        }
    }
    if (g.bias)
        for (long column = begin; column < end; column++) {
            double sum = 0;
            for (long n = 0; n < t.rows; n++) sum += to_float(dz[n * padded + column]);
            g.bias[column] = static_cast<float>(sum);
        }
}

template <typename T>
void gradient(const Tile& t, const Gradient& g, const Retained& r, const uint32_t* packed_hidden, Workspace& w) {
    constexpr int per = Units<T>::per;
    const long padded = groups(t) * kGroup, wide = panels(t.width) * kPanel;
    Team::run(t.threads, [&](Team& team, int rank) {
        if (w.logits_b) pack_logits_operand<T>(t, team, rank, w.logits_b);
        if (w.hidden_b) {
            const T* weight = static_cast<const T*>(t.weight);
            const auto [begin, end] = team.share(rank, wide / kPanel, 1);
            for (long p = begin; p < end; p++)
                pack_panel(weight + p * kPanel, t.weight_stride, t.width - p * kPanel, t.columns,
                           padded / per, w.hidden_b + p * (padded / per) * kPanel);
        }
        team.barrier();
        const auto& l = w.local[rank];
        for_blocks(t, team, rank, [&](long row, long count, long group) {
            const long column = t.first + group * kGroup;
            T* dz = w.dz ? static_cast<T*>(w.dz) + row * padded + group * kGroup : static_cast<T*>(l.dz);
            const long stride = w.dz ? padded : kGroup;
            if (!r.exps) group_logits<T>(t, row, count, group, w.logits_b, l);
            for (long i = 0; i < count; i++) {
                const long at = (row + i) * groups(t) + group;
                if (r.exps)
                    gradient_row_retained(t, g, row + i, column, static_cast<const T*>(r.exps) + at * kGroup,
                                          r.bases[at], dz + i * stride);
                else
                    gradient_row(t, g, row + i, column, l.z + i * kGroup, l.slope + i * kGroup, dz + i * stride);
            }
            if (!w.hidden_b) return;
            gemm<T>(reinterpret_cast<const uint32_t*>(dz), kRows * stride / per, stride / per, 1,
                    w.hidden_b + group * (kGroup / per) * kPanel, padded / per, kGroup / per, count, wide / kPanel,
                    g.hidden + row * wide, wide, true);
        });
        if (!w.dz) return;
        team.barrier();
        weight_gradient<T>(t, g, team, rank, static_cast<const T*>(w.dz), packed_hidden, l);
    });
}

template <typename T>
void topk(const Tile& t, const Statistics& s, const Candidates& c, Workspace& w) {
    Team::run(t.threads, [&](Team& team, int rank) {
        pack_logits_operand<T>(t, team, rank, w.logits_b);
        team.barrier();
        const auto& l = w.local[rank];
        for_blocks(t, team, rank, [&](long row, long count, long g) {
            group_logits<T>(t, row, count, g, w.logits_b, l);
            const long column = t.first + g * kGroup, valid = std::min(kGroup, t.columns - g * kGroup);
            for (long i = 0; i < count; i++) {
                float* z = l.z + i * kGroup;
                const Hits hits = find(t, row + i, column, column + kGroup);
                for (long e = hits.begin; e < hits.end; e++) {
                    const long at = (row + i) * t.entries + e;
                    s.selected[at] = z[t.ids[at] - column];
                }
                topk_row(c, row + i, column, valid, g + 1 == groups(t), z);
            }
        });
    });
}

template <typename T>
void pack_hidden(const Tile& t, uint32_t* out) {
    const T* hidden = static_cast<const T*>(t.hidden);
    const long depth = Units<T>::count(t.rows);
    Team::run(t.threads, [&](Team& team, int rank) {
        const auto [begin, end] = team.share(rank, panels(t.width), 1);
        for (long p = begin; p < end; p++)
            pack_panel(hidden + p * kPanel, t.hidden_stride, t.width - p * kPanel, t.rows, depth,
                       out + p * depth * kPanel);
    });
}

}  // namespace

#define DADPO_JOIN2(a, b) a##b
#define DADPO_JOIN(a, b) DADPO_JOIN2(a, b)
#define DADPO_STRING2(a) #a
#define DADPO_STRING(a) DADPO_STRING2(a)

const Passes* DADPO_JOIN(passes_, DADPO_ISA)() {
    static const Passes passes = {
        DADPO_STRING(DADPO_ISA),
        kPanel,
        [](const Tile& t, bool logits, bool grad_hidden, bool keep_dz) {
            return Workspace(t, nullptr, logits, grad_hidden, keep_dz).arena.used();
        },
        [](const Tile& t, uint32_t* out) { t.bf16 ? pack_hidden<uint16_t>(t, out) : pack_hidden<float>(t, out); },
        [](const Tile& t, const Statistics& s, const Retained& r, char* space) {
            Workspace w(t, space, true, false, false);
            t.bf16 ? statistics<uint16_t>(t, s, r, w) : statistics<float>(t, s, r, w);
        },
        [](const Tile& t, const Gradient& g, const Retained& r, const uint32_t* packed_hidden, char* space) {
            Workspace w(t, space, !r.exps, g.hidden, g.weight || g.bias);
            t.bf16 ? gradient<uint16_t>(t, g, r, packed_hidden, w) : gradient<float>(t, g, r, packed_hidden, w);
        },
        [](const Tile& t, const Statistics& s, const Candidates& c, char* space) {
            Workspace w(t, space, true, false, false);
            t.bf16 ? topk<uint16_t>(t, s, c, w) : topk<float>(t, s, c, w);
        },
        live_exponentials,
        live_columns,
        live_residuals,
    };
    return &passes;
}

}  // namespace dadpo
