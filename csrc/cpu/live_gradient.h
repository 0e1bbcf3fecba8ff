// The live plan's backward for a chunk of tokens and the live columns of one tile. It runs two products: rows of the
// weight are gathered while they are packed, and rows of the weight's gradient are scattered while they are in cache.
//
// The gradient of hidden is split over threads by tokens, that of the weight by columns. So no two threads add to the
// same element, and sums do not depend on the number of threads.
#pragma once

#include <vector>

#include "arena.h"
#include "rows.h"
#include "team.h"

namespace dadpo {
namespace {

// The workspace: packed operands that all threads share, and buffers per thread. Sizes are in the constructor.
template <typename U>
struct LiveSpace {
    struct Local {
        uint32_t* dz;  // A of dz^T W: [kBlock tokens, sweep] units
        float* rows;  // [kBlock, padded width] of the weight's gradient
    };
    Arena arena;
    uint32_t* hidden = nullptr;  // B of dz hidden: panels over the width, tokens deep
    uint32_t* weight = nullptr;  // B of dz^T W: panels over the width, one sweep of live columns deep
    std::vector<Local> local;  // [threads]

    LiveSpace(const LiveGradient& g, char* base) : arena(base) {
        const long wide = panels_of(g.width) * kPanel, sweep = sweep_of<U>(Units<U>::count(g.columns));
        if (g.grad_weight) hidden = arena.take<uint32_t>(wide * Units<U>::count(g.rows));
        if (g.grad_hidden) weight = arena.take<uint32_t>(wide * sweep);
        for (int i = 0; i < g.threads; i++) {
            Local l{};
            if (g.grad_hidden) l.dz = arena.take<uint32_t>(kBlock * sweep);
            if (g.grad_weight) l.rows = arena.take<float>(kBlock * wide);
            local.push_back(l);
        }
    }
};

template <typename T>
long live_workspace_bytes(const LiveGradient& g) {
    return LiveSpace<OperandOf<T>>(g, nullptr).arena.used();
}

// grad_hidden [rows, width] += dz^T W, one sweep of live columns after the other.
template <typename T, typename U = OperandOf<T>>
void live_hidden_gradient(const LiveGradient& g, Team& team, int rank,
                          uint32_t* packed, uint32_t* block) {  // LiveSpace::weight and Local::dz
    constexpr int per = Units<U>::per;
    const T* weight = static_cast<const T*>(g.weight);
    const long panels = panels_of(g.width), stride = Units<U>::count(g.rows) * per;  // of dz, in elements
    const long units = Units<U>::count(g.columns), sweep = sweep_of<U>(units);
    for (long k = 0; k < units; k += sweep) {
        const long part = std::min(sweep, units - k), first = k * per, columns = std::min(part * per, g.columns - first);
        // All ranks gather and pack the sweep's live rows of the weight. A bfloat16 unit pairs two live columns, whose
        // distance in the weight is the source's row stride.
        const auto [begin, end] = team.share(rank, part, 1);
        for (long j = begin; j < end; j++) {
            const int64_t* id = g.live + first + j * per;
            const long available = std::min<long>(per, columns - j * per);  // live columns in this unit
            const T* row = weight + id[0] * g.weight_stride;
            const long ld = available > 1 ? (id[1] - id[0]) * g.weight_stride : 0;
            for (long p = 0; p < panels; p++)
                pack_panel<U>(row + p * kPanel, ld, g.width - p * kPanel, available, 1, packed + (p * part + j) * kPanel);
        }
        team.barrier();
        // Each rank multiplies its tokens, in blocks.
        const auto [top, bottom] = team.share(rank, g.rows, kGrain<U>);
        for (long row = top; row < bottom; row += kBlock) {
            const long count = std::min(kBlock, bottom - row);
            pack_blocks_transposed(static_cast<const U*>(g.dz) + first * stride + row, stride, count, columns, block);
            gemm<U>(block, by_blocks<U>(part), packed, part, part, count, panels,
                    g.grad_hidden + row * g.grad_hidden_stride, g.grad_hidden_stride, true);
        }
        team.barrier();  // the next sweep overwrites `packed`
    }
}

// grad_weight [live columns [begin, end), width] += dz hidden. Products go to `space` [kBlock, padded width] first.
template <typename U>
void live_weight_gradient(const LiveGradient& g, long begin, long end, const uint32_t* hidden, float* space) {
    const long depth = Units<U>::count(g.rows), panels = panels_of(g.width), wide = panels * kPanel;
    const uint32_t* dz = static_cast<const uint32_t*>(g.dz);
    for (long column = begin, count; column < end; column += count) {
        count = std::min(kBlock, end - column);
        gemm<U>(dz + column * depth, by_rows<U>(depth), hidden, depth, depth, count, panels, space, wide, false);
        for (long i = 0; i < count; i++) {
            float* out = g.grad_weight + (g.live[column + i] - g.first) * g.grad_weight_stride;
            const float* row = space + i * wide;
            for (long j = 0; j < g.width; j += kLanes)
                store_some(out + j, load_some(out + j, g.width - j) + load<vf>(row + j), g.width - j);
        }
    }
}

template <typename T>
void live_gradient(const LiveGradient& g, char* workspace) {
    using U = OperandOf<T>;
    const LiveSpace<U> space(g, workspace);
    const long depth = Units<U>::count(g.rows), panels = panels_of(g.width);
    Team::run(g.threads, [&](Team& team, int rank) {
        if (g.grad_hidden) live_hidden_gradient<T>(g, team, rank, space.weight, space.local[rank].dz);
        if (!g.grad_weight) return;
        const auto [first, last] = team.share(rank, panels, 1);
        for (long p = first; p < last; p++)
            pack_panel<U>(static_cast<const T*>(g.hidden) + p * kPanel, g.hidden_stride, g.width - p * kPanel, g.rows,
                          depth, space.hidden + p * depth * kPanel);
        team.barrier();
        const auto [begin, end] = team.share(rank, g.columns, kGrain<U>);
        live_weight_gradient<U>(g, begin, end, space.hidden, space.local[rank].rows);
    });
}

}  // namespace
}  // namespace dadpo
