// The passes over one vocabulary tile: logits by GEMM, row pass, GEMMs of the gradients. Compiled once per instruction
// set, which DADPO_ISA names.
//
// Threads get fixed contiguous shares of the rows, and each row processes its columns in the same order for any share,
// so results do not depend on the number of threads. The weight gradient is split over columns instead.

#include "arena.h"
#include "live.h"
#include "live_gradient.h"
#include "rows.h"
#include "team.h"

namespace dadpo {
namespace {

long groups(const Tile& t) { return (t.columns + kGroup - 1) / kGroup; }

// The workspace of a pass. What the pass does not need stays null or unset. `padded` columns are whole groups.
struct Workspace {
    uint32_t* logits_b = nullptr;  // the tile's weight as B of hidden W^T: panels over padded columns, width deep
    uint32_t* hidden_b = nullptr;  // the tile's weight as B of dz W: panels over the width, padded columns deep
    void* dz = nullptr;  // [groups, rows, kGroup] operand type, plus kLanes units of slack, for the weight gradient
    struct Local {
        float *z, *slope;  // [kBlock, kGroup] logits, and the softcap's derivative
        float* c;  // [kBlock, padded width] rows of the weight gradient
        uint32_t* hidden;  // A of hidden W^T: [kBlock, width] units, bfloat16 only
        uint32_t* a;  // A of dz^T hidden: [kBlock, kInner] units
        void* dz;  // [kBlock, kGroup] operand type, if dz is not kept for the weight gradient
    };
    std::vector<Local> local;  // [threads]

    Workspace(const Tile& t, char* base, bool logits, bool grad_hidden, bool keep_dz) : arena(base) {
        const long per = t.bf16 ? Units<OperandOf<uint16_t>>::per : 1, depth = (t.width + per - 1) / per;
        const long padded = groups(t) * kGroup;
        if (logits) logits_b = arena.take<uint32_t>(padded * depth);
        if (grad_hidden) hidden_b = arena.take<uint32_t>(panels_of(t.width) * kPanel * (padded / per));
        if (keep_dz) dz = arena.take<uint32_t>(t.rows * (padded / per) + kLanes);
        for (int i = 0; i < t.threads; i++) {
            Local l{};
            l.z = arena.take<float>(kBlock * kGroup);
            l.slope = arena.take<float>(kBlock * kGroup);
            if (logits && t.bf16) l.hidden = arena.take<uint32_t>(kBlock * operand_stride<OperandOf<uint16_t>>(t.width));
            if (!keep_dz) l.dz = arena.take<float>(kBlock * kGroup);
            if (keep_dz) {
                l.c = arena.take<float>(kBlock * panels_of(t.width) * kPanel);
                l.a = arena.take<uint32_t>(kBlock * kInner);
            }
            local.push_back(l);
        }
    }
    Arena arena;
};

// Packs this rank's share of the tile's weight into Workspace::logits_b.
template <typename T>
void pack_logits_operand(const Tile& t, const Team& team, int rank, uint32_t* out) {
    using U = OperandOf<T>;
    const T* weight = static_cast<const T*>(t.weight);
    const long depth = Units<U>::count(t.width);
    const auto [begin, end] = team.share(rank, groups(t) * kGroup / kPanel, 1);
    for (long p = begin; p < end; p++) {
        const long column = p * kPanel;
        pack_panel_transposed<U>(weight + column * t.weight_stride, t.weight_stride, t.columns - column, t.width,
                                 out + p * depth * kPanel);
    }
}

// Logits of rows [row, row + count) and column group `g`, to l.z [count, kGroup]; with a softcap also l.slope. Groups
// of a block come in ascending order, so group 0 converts the rows to an operand and the others reuse it.
template <typename T>
void group_logits(const Tile& t, long row, long count, long g, const uint32_t* packed, const Workspace::Local& l) {
    using U = OperandOf<T>;
    constexpr bool in_place = std::is_same_v<T, float>;
    const long depth = Units<U>::count(t.width), stride = in_place ? t.hidden_stride : operand_stride<U>(t.width);
    const T* rows = static_cast<const T*>(t.hidden) + row * t.hidden_stride;
    U* space = reinterpret_cast<U*>(l.hidden);
    const U* operand = in_place || g == 0 ? operand_rows(rows, t.hidden_stride, count, t.width, space) : space;
    const uint32_t* a = reinterpret_cast<const uint32_t*>(operand);
    gemm<U>(a, by_rows<U>(stride), packed + g * kGroup * depth, depth, depth, count, kGroup / kPanel, l.z, kGroup, false);
    const long valid = std::min(kGroup, t.columns - g * kGroup);
    for (long i = 0; i < count; i++)
        finish_logits(t, t.first + g * kGroup, valid, l.z + i * kGroup, l.slope + i * kGroup);
}

// Visits this rank's rows in blocks, and every group of columns for each block.
template <typename T, typename Visit>
void for_blocks(const Tile& t, const Team& team, int rank, Visit visit) {
    const auto [begin, end] = team.share(rank, t.rows, kGrain<OperandOf<T>>);
    for (long row = begin; row < end; row += kBlock)
        for (long g = 0; g < groups(t); g++) visit(row, std::min(kBlock, end - row), g);
}

// Forward: per block of rows and group of columns, logits by GEMM, then the row pass while they are in cache.
template <typename T>
void forward(const Tile& t, const Statistics& s, const Retained& r, Workspace& w) {
    Team::run(t.threads, [&](Team& team, int rank) {
        pack_logits_operand<T>(t, team, rank, w.logits_b);
        team.barrier();
        const auto& l = w.local[rank];
        for_blocks<T>(t, team, rank, [&](long row, long count, long g) {
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

// dW [columns, width] = dz^T hidden for this rank's columns, accumulated in float32 over all rows and rounded once;
// also the bias gradient.
template <typename T, typename U = OperandOf<T>>
void weight_gradient(const Tile& t, const Gradient& g, const Team& team, int rank,
                     const U* dz,  // [groups, rows, kGroup]
                     const uint32_t* packed_hidden,  // from `pack_hidden`
                     const Workspace::Local& l) {
    constexpr int per = Units<U>::per;
    const long depth = Units<U>::count(t.rows), sweep = sweep_of<U>(depth), wide = panels_of(t.width) * kPanel;
    const auto [begin, end] = team.share(rank, t.columns, kGrain<U>);
    for (long column = begin, count; g.weight && column < end; column += count) {
        // A block of columns must lie in one group, because dz is stored by groups.
        const long inside = column % kGroup;
        const U* group = dz + (column - inside) * t.rows + inside;
        count = std::min({kBlock, end - column, kGroup - inside});
        for (long k = 0; k < depth; k += sweep) {
            const long part = std::min(sweep, depth - k);
            pack_blocks_transposed(group + k * per * kGroup, kGroup, count, std::min(part * per, t.rows - k * per), l.a);
            gemm<U>(l.a, by_blocks<U>(part), packed_hidden + k * kPanel, depth, part, count, wide / kPanel, l.c,
                    wide, k > 0);
        }
        // Round to the weight's type; the last vector of a row may be partial.
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
    // Bias gradient: column sums of dz.
    if (g.bias)
        for (long column = begin; column < end; column++) {
            const U* group = dz + column / kGroup * kGroup * t.rows + column % kGroup;
            double sum = 0;
            for (long n = 0; n < t.rows; n++) sum += to_float(group[n * kGroup]);
            g.bias[column] = static_cast<float>(sum);
        }
}

// Backward: dz from retained exponentials or recomputed logits, then its products with weight and hidden.
template <typename T>
void backward(const Tile& t, const Gradient& g, const Retained& r, const uint32_t* packed_hidden, Workspace& w) {
    using U = OperandOf<T>;
    constexpr int per = Units<U>::per;
    const long padded = groups(t) * kGroup, wide = panels_of(t.width) * kPanel;
    Team::run(t.threads, [&](Team& team, int rank) {
        // Pack the tile's weight for the products that this call needs.
        if (w.logits_b) pack_logits_operand<T>(t, team, rank, w.logits_b);
        if (w.hidden_b) {
            const T* weight = static_cast<const T*>(t.weight);
            const auto [begin, end] = team.share(rank, wide / kPanel, 1);
            for (long p = begin; p < end; p++)
                pack_panel<U>(weight + p * kPanel, t.weight_stride, t.width - p * kPanel, t.columns,
                              padded / per, w.hidden_b + p * (padded / per) * kPanel);
        }
        team.barrier();
        const auto& l = w.local[rank];
        for_blocks<T>(t, team, rank, [&](long row, long count, long group) {
            // The gradient of the logits, [count, kGroup].
            const long column = t.first + group * kGroup;
            U* dz = w.dz ? static_cast<U*>(w.dz) + (group * t.rows + row) * kGroup : static_cast<U*>(l.dz);
            if (!r.exps) group_logits<T>(t, row, count, group, w.logits_b, l);
            for (long i = 0; i < count; i++) {
                const long at = (row + i) * groups(t) + group;
                if (r.exps)
                    gradient_row_retained(t, g, row + i, column, static_cast<const T*>(r.exps) + at * kGroup,
                                          r.bases[at], dz + i * kGroup);
                else
                    gradient_row(t, g, row + i, column, l.z + i * kGroup, l.slope + i * kGroup, dz + i * kGroup);
            }
            // Accumulate its product with the weight into the gradient of hidden.
            if (!w.hidden_b) return;
            gemm<U>(reinterpret_cast<const uint32_t*>(dz), by_rows<U>(kGroup / per),
                    w.hidden_b + group * (kGroup / per) * kPanel, padded / per, kGroup / per, count, wide / kPanel,
                    g.hidden + row * wide, wide, true);
        });
        if (!w.dz) return;
        team.barrier();  // the weight gradient reads dz of all rows
        weight_gradient<T>(t, g, team, rank, static_cast<const U*>(w.dz), packed_hidden, l);
    });
}

// Top k: logits as in the forward, the entries' logits, then the candidates.
template <typename T>
void topk(const Tile& t, const Statistics& s, const Candidates& c, Workspace& w) {
    Team::run(t.threads, [&](Team& team, int rank) {
        pack_logits_operand<T>(t, team, rank, w.logits_b);
        team.barrier();
        const auto& l = w.local[rank];
        for_blocks<T>(t, team, rank, [&](long row, long count, long g) {
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

// Packs hidden as B of dz^T hidden: panels over the width, t.rows deep.
template <typename T>
void pack_hidden(const Tile& t, uint32_t* out) {
    using U = OperandOf<T>;
    const T* hidden = static_cast<const T*>(t.hidden);
    const long depth = Units<U>::count(t.rows);
    Team::run(t.threads, [&](Team& team, int rank) {
        const auto [begin, end] = team.share(rank, panels_of(t.width), 1);
        for (long p = begin; p < end; p++)
            pack_panel<U>(hidden + p * kPanel, t.hidden_stride, t.width - p * kPanel, t.rows, depth,
                          out + p * depth * kPanel);
    });
}

}  // namespace

#define DADPO_JOIN2(a, b) a##b
#define DADPO_JOIN(a, b) DADPO_JOIN2(a, b)
#define DADPO_STRING2(a) #a
#define DADPO_STRING(a) DADPO_STRING2(a)

const Passes* DADPO_JOIN(passes_, DADPO_ISA)() {
    static const Passes passes = {  // in the order of the fields of Passes
        DADPO_STRING(DADPO_ISA),
        kPanel,
        sizeof(OperandOf<uint16_t>) == sizeof(uint16_t),
        [](const Tile& t, bool logits, bool grad_hidden, bool keep_dz) {
            return Workspace(t, nullptr, logits, grad_hidden, keep_dz).arena.used();
        },
        [](const Tile& t, uint32_t* out) { t.bf16 ? pack_hidden<uint16_t>(t, out) : pack_hidden<float>(t, out); },
        [](const Tile& t, const Statistics& s, const Retained& r, char* space) {
            Workspace w(t, space, true, false, false);
            t.bf16 ? forward<uint16_t>(t, s, r, w) : forward<float>(t, s, r, w);
        },
        [](const Tile& t, const Gradient& g, const Retained& r, const uint32_t* packed_hidden, char* space) {
            Workspace w(t, space, !r.exps, g.hidden, g.weight || g.bias);
            t.bf16 ? backward<uint16_t>(t, g, r, packed_hidden, w) : backward<float>(t, g, r, packed_hidden, w);
        },
        [](const Tile& t, const Statistics& s, const Candidates& c, char* space) {
            Workspace w(t, space, true, false, false);
            t.bf16 ? topk<uint16_t>(t, s, c, w) : topk<float>(t, s, c, w);
        },
        [](const Tile& t, const Statistics& s, float* exps, float* bases) {
            t.bf16 ? live_exponentials<uint16_t>(t, s, exps, bases) : live_exponentials<float>(t, s, exps, bases);
        },
        live_columns,
        live_residuals,
        [](const LiveGradient& g) { return g.bf16 ? live_workspace_bytes<uint16_t>(g) : live_workspace_bytes<float>(g); },
        [](const LiveGradient& g, char* space) {
            g.bf16 ? live_gradient<uint16_t>(g, space) : live_gradient<float>(g, space);
        },
    };
    return &passes;
}

}  // namespace dadpo
