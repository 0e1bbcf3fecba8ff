// Packed GEMM for float32 and bfloat16 operands with float32 results.
//
// ATen's bfloat16 product rounds its result to bfloat16, which costs the loss about 1.6 nats per sequence; this one
// keeps float32. Matrices of type T are read as operands of type U: bfloat16 stays bfloat16 if the processor has
// bfloat16 dot products, otherwise packing widens it to float32. A "unit" is 4 bytes along the inner dimension (one
// float or a pair of bfloat16), so both types share all loops and differ only in `Dot`; where AMX multiplies, bfloat16 has
// blocks of its own, see tiles.h. Depths and strides are in units. Layouts:
//   A  unit (i, k) where `Strides` says
//   B  panels of kPanel columns: b[panel][k][kPanel] units
//   C  row-major float32, row stride ldc
// BLIS-style register blocks of kRows x kPanel accumulators (Van Zee & van de Geijn, doi 10.1145/2764454).
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "simd.h"
#if defined(DADPO_TILES)
#include "tiles.h"
#endif

namespace dadpo {
namespace {

constexpr int kRows = 6;  // of A per register block, but for tiled products
constexpr int kPanel = kRowVectors * kLanes;  // columns per register block
inline long panels_of(long columns) { return (columns + kPanel - 1) / kPanel; }
constexpr long kLine = 16;  // units in a cache line
// Maximum units of the inner dimension per sweep. Longer sweeps read and write C less often, but one sweep of a panel
// must stay in cache.
constexpr long kInner = kLanes == 16 ? 256 : 512;

// The type in which a product reads matrices of T.
template <typename T>
struct Operand {
    using type = float;
};
#if defined(__AVX512BF16__) || defined(DADPO_TILES)
template <>
struct Operand<uint16_t> {
    using type = uint16_t;
};
#endif
template <typename T>
using OperandOf = typename Operand<T>::type;

template <typename U>
struct Units {
    static constexpr int per = 4 / sizeof(U);  // elements in a unit
    static long count(long elements) { return (elements + per - 1) / per; }
};

// Products of type U are AMX's.
template <typename U>
#if defined(DADPO_TILES)
constexpr bool kTiled = std::is_same_v<U, uint16_t>;
#else
constexpr bool kTiled = false;
#endif
// Rows of A per block.
template <typename U>
constexpr int kBlockRows = kTiled<U> ? 32 : kRows;
// Rows of A that a thread's share is a multiple of.
template <typename U>
constexpr int kGrain = kTiled<U> ? 16 : kRows;

// Where A has unit (i, k), with R = kBlockRows: at a[i / R * block + i % R * row + k * inner].
struct Strides {
    long block, row, inner;
};
// Of a matrix whose rows are `stride` units apart.
template <typename U>
constexpr Strides by_rows(long stride) {
    return {kBlockRows<U> * stride, stride, 1};
}
// Of what `pack_blocks_transposed` leaves.
template <typename U>
constexpr Strides by_blocks(long depth) {
    if constexpr (kTiled<U>) return by_rows<U>(depth);
    return {kRows * depth, 1, kRows};
}

// acc + the dot products of unit `a`, broadcast, with the units `b` [kLanes].
template <typename U>
struct Dot;
template <>
struct Dot<float> {
    static vf add(vf acc, uint32_t a, vu b) {
        float x;
        memcpy(&x, &a, 4);
        return acc + x * (vf)b;
    }
};
#if defined(__AVX512BF16__) && !defined(DADPO_TILES)
template <>
struct Dot<uint16_t> {
    static vf add(vf acc, uint32_t a, vu b) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
};
#endif

// Register block: c [R, kPanel] (+)= A [R, depth] times one B panel. Sums start at zero and are added to C at the end:
// tens of thousands of softmax terms, each below half an ulp of C, would be lost if they were added one by one.
template <typename U, int R>
inline void micro(const uint32_t* a, Strides in, const uint32_t* b, long depth, float* c, long ldc, bool accumulate) {
    vf acc[R][kRowVectors];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < kRowVectors; j++) acc[i][j] = vf{};
#pragma GCC unroll 2
    for (long k = 0; k < depth; k++) {
        vu col[kRowVectors];
        for (int j = 0; j < kRowVectors; j++) col[j] = load<vu>(b + k * kPanel + j * kLanes);
#pragma GCC unroll 6
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < kRowVectors; j++)
                acc[i][j] = Dot<U>::add(acc[i][j], a[i * in.row + k * in.inner], col[j]);
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < kRowVectors; j++) {
            float* out = c + i * ldc + j * kLanes;
            store(out, accumulate ? load<vf>(out) + acc[i][j] : acc[i][j]);
        }
}

// Units per sweep: `depth` in equal sweeps of at most kInner, of whole slices where products are tiled; the last may be
// shorter.
template <typename U>
inline long sweep_of(long depth) {
    constexpr long slice = kTiled<U> ? 16 : 1;
    const long sweeps = std::max(1L, (depth + kInner - 1) / kInner);
    return ((depth + sweeps - 1) / sweeps + slice - 1) / slice * slice;
}

// Prefetches memory into L2, spread evenly over `steps` register blocks of a product.
struct Prefetch {
    const uint32_t* at;
    long units, slice;  // units left; units per step, in whole cache lines

    Prefetch(const uint32_t* begin, long units, long steps)
        : at(begin), units(units), slice((units / std::max(1L, steps) / kLine + 1) * kLine) {}
    void step() {
        const long count = std::min(slice, units);
        for (long i = 0; i < count; i += kLine) __builtin_prefetch(at + i, 0, 2);
        at += count;
        units -= count;
    }
};

// C [rows, panels * kPanel] (+)= A [rows, depth] B [depth, panels * kPanel]. B panels are `b_depth` units deep. While a
// panel is multiplied, the next panel is prefetched, and so is a part of `ahead` [ahead_units], the memory the caller
// reads next.
template <typename U>
inline void gemm(const uint32_t* a, Strides in, const uint32_t* b, long b_depth, long depth, long rows, long panels,
                 float* c, long ldc, bool accumulate, const uint32_t* ahead = nullptr, long ahead_units = 0) {
    constexpr long R = kBlockRows<U>;
    const long blocks = (rows + R - 1) / R, sweep = sweep_of<U>(depth);
#if defined(DADPO_TILES)
    [[maybe_unused]] Tiles tiles;
#endif
    Prefetch later(ahead, ahead_units, (depth + kInner - 1) / kInner * panels * blocks);
    for (long k0 = 0; k0 < depth; k0 += sweep) {
        const long part = std::min(sweep, depth - k0);
        const bool add = accumulate || k0 > 0;
        for (long p = 0; p < panels; p++) {
            const uint32_t* panel = b + (p * b_depth + k0) * kPanel;
            Prefetch next(panel + b_depth * kPanel, p + 1 < panels ? part * kPanel : 0, blocks);
            for (long i = 0; i < rows; i += R) {
                next.step();
                later.step();
                const uint32_t* block = a + (i / R) * in.block + k0 * in.inner;
                float* out = c + i * ldc + p * kPanel;
                const long count = std::min(R, rows - i);
#if defined(DADPO_TILES)
                if constexpr (kTiled<U>) {
                    static_assert(kBlockRows<U> == kTiledRows && kPanel % kTiledColumns == 0);
                    for (int j = 0; j < kPanel; j += kTiledColumns)
                        tiled_micro(tiles, count, block, in.row, panel + j, kPanel, part, out + j, ldc, add);
                    continue;
                }
#endif
                if constexpr (!kTiled<U>) switch (count) {
                    case 6: micro<U, 6>(block, in, panel, part, out, ldc, add); break;
                    case 5: micro<U, 5>(block, in, panel, part, out, ldc, add); break;
                    case 4: micro<U, 4>(block, in, panel, part, out, ldc, add); break;
                    case 3: micro<U, 3>(block, in, panel, part, out, ldc, add); break;
                    case 2: micro<U, 2>(block, in, panel, part, out, ldc, add); break;
                    default: micro<U, 1>(block, in, panel, part, out, ldc, add);
                }
            }
        }
    }
}

// An element of type T as operand type U.
template <typename U, typename T>
inline U as_operand(T x) {
    if constexpr (std::is_same_v<U, T>) return x;
    else return to_float(x);
}

// kLanes units whose elements are contiguous in memory.
template <typename U, typename T>
inline vu row_units(const T* p) {
    if constexpr (std::is_same_v<U, T>) return load<vu>(p);
    else return widen(p) << 16;
}

// kLanes units of adjacent columns; the elements of a unit are `ld` elements apart.
template <typename U, typename T>
inline vu column_units(const T* row, [[maybe_unused]] long ld) {
    if constexpr (Units<U>::per == 1) return row_units<U>(row);
    else return widen(row) | (widen(row + ld) << 16);
}

// One unit from up to `available` elements that are `stride` elements apart; missing ones are zero.
template <typename U, typename T>
inline uint32_t unit(const T* p, long stride, long available) {
    U parts[Units<U>::per] = {};
    for (long i = 0; i < std::min<long>(Units<U>::per, available); i++) parts[i] = as_operand<U>(p[i * stride]);
    uint32_t u;
    memcpy(&u, parts, 4);
    return u;
}

// Units between the rows of a copied A of `width` elements. Where products are tiled, an odd number of cache lines: the
// 16 rows of a register then lie in different sets of the cache, which rows 4 KiB apart would not.
template <typename U>
inline long operand_stride(long width) {
    const long units = Units<U>::count(width);
    return kTiled<U> ? ((units + kLine - 1) / kLine | 1) * kLine : units;
}

// A from `rows` rows of a matrix with row stride `ld`. float32 is used in place; bfloat16 is copied to `space`, each
// row padded with zeros to `operand_stride`.
inline const float* operand_rows(const float* source, long, long, long, float*) { return source; }
template <typename U>
inline const U* operand_rows(const uint16_t* source, long ld, long rows, long width, U* space) {
    const long stride = operand_stride<U>(width) * Units<U>::per;
    for (long i = 0; i < rows; i++) {
        U* out = space + i * stride;
        for (long j = 0; j < width; j++) out[j] = as_operand<U>(source[i * ld + j]);
        std::fill(out + width, out + stride, U{});
    }
    return space;
}

// In-register transpose of kLanes x kLanes units (Eklundh): swaps the off-diagonal W x W blocks of each 2W x 2W block,
// for W = 1, 2, 4, ...
template <int W, int... L>
inline void swap_blocks(vu* rows, std::integer_sequence<int, L...>) {
    for (int i = 0; i < kLanes; i++) {
        if (i & W) continue;
        const vu a = rows[i], b = rows[i + W];
#if defined(__clang__)
        rows[i] = __builtin_shufflevector(a, b, (L & W ? kLanes + L - W : L)...);
        rows[i + W] = __builtin_shufflevector(a, b, (L & W ? kLanes + L : L + W)...);
#else
        rows[i] = __builtin_shuffle(a, b, vu{(L & W ? kLanes + L - W : L)...});
        rows[i + W] = __builtin_shuffle(a, b, vu{(L & W ? kLanes + L : L + W)...});
#endif
    }
    if constexpr (2 * W < kLanes) swap_blocks<2 * W>(rows, std::integer_sequence<int, L...>{});
}

// One B panel [count(depth), kPanel] from a matrix whose rows are the columns of B (inner dimension contiguous), as
// weight [V, H] for the logits. `ld` and `depth` are in elements; columns past `columns` are zero.
template <typename U, typename T>
inline void pack_panel_transposed(const T* source, long ld, long columns, long depth, uint32_t* panel) {
    constexpr int per = Units<U>::per;
    const long units = Units<U>::count(depth), whole = depth / per;
    for (long k = 0; k < units; k += kLanes)
        for (long j = 0; j < kPanel; j += kLanes) {
            // Whole kLanes x kLanes blocks are transposed in registers; the edges are copied unit by unit.
            const T* corner = source + j * ld + k * per;
            if (j + kLanes <= columns && k + kLanes <= whole) {
                vu rows[kLanes];
                for (int i = 0; i < kLanes; i++) rows[i] = row_units<U>(corner + i * ld);
                swap_blocks<1>(rows, std::make_integer_sequence<int, kLanes>{});
                for (int i = 0; i < kLanes; i++) store(panel + (k + i) * kPanel + j, rows[i]);
                continue;
            }
            for (long c = k; c < std::min(k + kLanes, units); c++)
                for (long i = 0; i < kLanes; i++)
                    panel[c * kPanel + j + i] =
                        j + i < columns ? unit<U>(corner + i * ld + (c - k) * per, 1, depth - c * per) : 0;
        }
}

// One B panel [units, kPanel] from a matrix laid out as B (columns contiguous), as weight [V, H] or hidden [N, H] for
// the gradients. `ld` and `depth` are in elements; units past `depth` and columns past `columns` are zero.
template <typename U, typename T>
inline void pack_panel(const T* source, long ld, long columns, long depth, long units, uint32_t* panel) {
    constexpr int per = Units<U>::per;
    for (long k = 0; k < units; k++) {
        const T* row = source + k * per * ld;
        if (columns >= kPanel && (k + 1) * per <= depth) {
            for (long j = 0; j < kPanel; j += kLanes) store(panel + k * kPanel + j, column_units<U>(row + j, ld));
        } else {
            for (long j = 0; j < kPanel; j++)
                panel[k * kPanel + j] = j < columns ? unit<U>(row + j, ld, depth - k * per) : 0;
        }
    }
}

// A as the transpose of `source` [depth, columns] with row stride `ld`, such as dz: blocks[i][k][kRows] units, or rows
// [i][k] where products are tiled, see `by_blocks`. Iterates over source rows, so that each cache line is read once.
// Reads up to kLanes elements past a row's `columns` and ignores them.
template <typename U>
inline void pack_blocks_transposed(const U* source, long ld, long columns, long depth, uint32_t* blocks) {
    constexpr int per = Units<U>::per;
    const long units = Units<U>::count(depth);
    if constexpr (kTiled<U>) {
        for (long k = 0; k < units; k += kLanes)
            for (long i = 0; i < columns; i += kLanes) {
                // As in `pack_panel_transposed`: whole blocks in registers, the edges unit by unit.
                const U* corner = source + k * per * ld + i;
                uint32_t* out = blocks + i * units + k;
                if (i + kLanes <= columns && (k + kLanes) * per <= depth) {
                    vu block[kLanes];
                    for (int j = 0; j < kLanes; j++) block[j] = column_units<U>(corner + j * per * ld, ld);
                    swap_blocks<1>(block, std::make_integer_sequence<int, kLanes>{});
                    for (int j = 0; j < kLanes; j++) store(out + j * units, block[j]);
                    continue;
                }
                for (long j = 0; j < std::min<long>(kLanes, columns - i); j++)
                    for (long c = 0; c < std::min<long>(kLanes, units - k); c++)
                        out[j * units + c] = unit<U>(corner + c * per * ld + j, ld, depth - (k + c) * per);
            }
        return;
    }
    for (long k = 0; k < units; k++)
        for (long i = 0; i < columns; i += kRows) {
            const U* row = source + k * per * ld + i;
            uint32_t* out = blocks + i * units + k * kRows;
            const bool whole = (k + 1) * per <= depth;
            if (whole) {
                const vu vector = column_units<U>(row, ld);
                memcpy(out, &vector, std::min<long>(kRows, kLanes) * 4);
            }
            for (long j = whole ? kLanes : 0; j < kRows; j++) out[j] = unit<U>(row + j, ld, depth - k * per);
        }
}

}  // namespace
}  // namespace dadpo
