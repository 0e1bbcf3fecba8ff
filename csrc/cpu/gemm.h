// A packed matrix product for float32 and bfloat16 operands with float32 results.
//
// ATen's bfloat16 product rounds its result to bfloat16, which costs the loss about 1.6 nats a sequence; this one never
// rounds a logit. Where the processor multiplies bfloat16, that is the operands' type U too; elsewhere they are widened
// to float32 while they are packed. A "unit" is 4 bytes along the inner dimension: one float, or a pair of bfloat16, so
// both types share every loop and differ only in `Dot`. Layouts:
//   A  units reached as a[i * row_stride + k * k_stride]
//   B  panels of kPanel columns: b[panel][k][kPanel] units
// BLIS-style register tile of kRows x kPanel accumulators (Van Zee & van de Geijn, doi 10.1145/2764454).
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace dadpo {
namespace {

constexpr int kRows = 6;
constexpr int kPanel = kRowVectors * kLanes;
inline long panels_of(long columns) { return (columns + kPanel - 1) / kPanel; }
constexpr long kLine = 16;  // units in a cache line
// Units of the inner dimension per sweep, at most: C is read and written once a sweep, and a panel's sweep must stay near.
constexpr long kInner = kLanes == 16 ? 256 : 512;

// The type in which a product reads matrices of T.
template <typename T>
struct Operand {
    using type = float;
};
#if defined(__AVX512BF16__)
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
#if defined(__AVX512BF16__)
template <>
struct Dot<uint16_t> {
    static vf add(vf acc, uint32_t a, vu b) {
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    }
};
#endif

// Sums start at zero and are added to C at the end: tens of thousands of softmax terms, each below half a unit in the
// last place of C, would otherwise all be lost.
template <typename U, int R>
inline void micro(const uint32_t* a, long row_stride, long k_stride, const uint32_t* b, long depth, float* c, long ldc,
                  bool accumulate) {
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
                acc[i][j] = Dot<U>::add(acc[i][j], a[i * row_stride + k * k_stride], col[j]);
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < kRowVectors; j++) {
            float* out = c + i * ldc + j * kLanes;
            store(out, accumulate ? load<vf>(out) + acc[i][j] : acc[i][j]);
        }
}

// Units of a sweep: all of a product's are equal, but for the last.
inline long sweep_of(long depth) {
    const long sweeps = std::max(1L, (depth + kInner - 1) / kInner);
    return (depth + sweeps - 1) / sweeps;
}

// Fetches memory into L2 in slices of whole cache lines, one with each of `steps` steps of a product.
struct Prefetch {
    const uint32_t* at;
    long units, slice;

    Prefetch(const uint32_t* begin, long units, long steps)
        : at(begin), units(units), slice((units / std::max(1L, steps) / kLine + 1) * kLine) {}
    void step() {
        const long count = std::min(slice, units);
        for (long i = 0; i < count; i += kLine) __builtin_prefetch(at + i, 0, 2);
        at += count;
        units -= count;
    }
};

// C [rows, panels * kPanel] (+)= A [rows, depth units] B. `block_stride` is the step of A between blocks of kRows rows.
// While a panel meets the blocks of A, the next one is fetched, and meanwhile `ahead`: what the caller needs next.
template <typename U>
inline void gemm(const uint32_t* a, long block_stride, long row_stride, long k_stride, const uint32_t* b, long b_depth,
                 long depth, long rows, long panels, float* c, long ldc, bool accumulate,
                 const uint32_t* ahead = nullptr, long ahead_units = 0) {
    const long blocks = (rows + kRows - 1) / kRows, sweep = sweep_of(depth);
    Prefetch later(ahead, ahead_units, (depth + kInner - 1) / kInner * panels * blocks);
    for (long k0 = 0; k0 < depth; k0 += sweep) {
        const long part = std::min(sweep, depth - k0);
        const bool add = accumulate || k0 > 0;
        for (long p = 0; p < panels; p++) {
            const uint32_t* panel = b + (p * b_depth + k0) * kPanel;
            Prefetch next(panel + b_depth * kPanel, p + 1 < panels ? part * kPanel : 0, blocks);
            for (long i = 0; i < rows; i += kRows) {
                next.step();
                later.step();
                const uint32_t* block = a + (i / kRows) * block_stride + k0 * k_stride;
                float* out = c + i * ldc + p * kPanel;
                switch (std::min<long>(kRows, rows - i)) {
                    case 6: micro<U, 6>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    case 5: micro<U, 5>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    case 4: micro<U, 4>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    case 3: micro<U, 3>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    case 2: micro<U, 2>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    default: micro<U, 1>(block, row_stride, k_stride, panel, part, out, ldc, add);
                }
            }
        }
    }
}

// Elements as operands.
template <typename U, typename T>
inline U as_operand(T x) {
    if constexpr (std::is_same_v<U, T>) return x;
    else return to_float(x);
}

// A vector of units whose elements lie side by side.
template <typename U, typename T>
inline vu row_units(const T* p) {
    if constexpr (std::is_same_v<U, T>) return load<vu>(p);
    else return widen(p) << 16;
}

// A vector of units whose elements lie one row of `ld` apart.
template <typename U, typename T>
inline vu column_units(const T* row, [[maybe_unused]] long ld) {
    if constexpr (Units<U>::per == 1) return row_units<U>(row);
    else return widen(row) | (widen(row + ld) << 16);
}

// One unit of up to `Units<U>::per` elements that lie `stride` apart; missing ones are zero.
template <typename U, typename T>
inline uint32_t unit(const T* p, long stride, long available) {
    U parts[Units<U>::per] = {};
    for (long i = 0; i < std::min<long>(Units<U>::per, available); i++) parts[i] = as_operand<U>(p[i * stride]);
    uint32_t u;
    memcpy(&u, parts, 4);
    return u;
}

// A, from rows of a matrix: float32 in place; bfloat16 is copied to `space`, in whole units.
inline const float* operand_rows(const float* source, long, long, long, float*) { return source; }
template <typename U>
inline const U* operand_rows(const uint16_t* source, long ld, long rows, long width, U* space) {
    const long stride = Units<U>::count(width) * Units<U>::per;
    for (long i = 0; i < rows; i++) {
        U* out = space + i * stride;
        for (long j = 0; j < width; j++) out[j] = as_operand<U>(source[i * ld + j]);
        std::fill(out + width, out + stride, U{});
    }
    return space;
}

// Swaps the off-diagonal blocks of width W in each square of 2 W: for W = 1, 2, 4, ... that transposes (Eklundh).
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

// B panel from a matrix whose rows are the columns of B (inner dimension contiguous): weight [V, H] for the logits.
template <typename U, typename T>
inline void pack_panel_transposed(const T* source, long ld, long columns, long depth, uint32_t* panel) {
    constexpr int per = Units<U>::per;
    const long units = Units<U>::count(depth), whole = depth / per;
    for (long k = 0; k < units; k += kLanes)
        for (long j = 0; j < kPanel; j += kLanes) {
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

// B panel of `units` from a matrix laid out as B itself (columns contiguous): weight [V, H] or hidden [N, H] for the
// gradients. Units past `depth` are zero.
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

// Blocks of kRows rows from the transpose of a matrix (rows contiguous there): dz [N, columns] read as dz^T.
// Result: blocks[i][k][kRows] units, so row_stride is 1 and k_stride is kRows. Row by row of the source, so that each of
// its cache lines is read once. Up to kLanes elements past a row's `columns` are read and do not count.
template <typename U>
inline void pack_blocks_transposed(const U* source, long ld, long columns, long depth, uint32_t* blocks) {
    constexpr int per = Units<U>::per;
    const long units = Units<U>::count(depth);
    for (long k = 0; k < units; k++)
        for (long i = 0; i < columns; i += kRows) {
            const U* row = source + k * per * ld + i;
            uint32_t* out = blocks + i * units + k * kRows;
            const bool whole = (k + 1) * per <= depth;
            if (whole) {
                const vu units_here = column_units<U>(row, ld);
                memcpy(out, &units_here, std::min<long>(kRows, kLanes) * 4);
            }
            for (long j = whole ? kLanes : 0; j < kRows; j++) out[j] = unit<U>(row + j, ld, depth - k * per);
        }
}

}  // namespace
}  // namespace dadpo
