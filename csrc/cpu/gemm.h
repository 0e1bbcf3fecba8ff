// A packed matrix product for float32 and bfloat16 operands with float32 results.
//
// ATen's bfloat16 product rounds its result to bfloat16, which costs the loss about 1.6 nats a sequence; this one never
// rounds a logit. A "unit" is 4 bytes along the inner dimension: one float, or a pair of bfloat16, so both types share
// every loop and differ only in `Dot`. Layouts:
//   A  units reached as a[i * row_stride + k * k_stride]
//   B  panels of kPanel columns: b[panel][k][kPanel] units
// BLIS-style register tile of kRows x kPanel accumulators (Van Zee & van de Geijn, doi 10.1145/2764454).
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

#include "simd.h"

namespace dadpo {
namespace {

constexpr int kRows = 6;
constexpr int kPanel = kRowVectors * kLanes;
constexpr long kInner = 1024;  // units of the inner dimension per sweep: a panel's sweep stays in the L2 cache

template <typename T>
struct Units {
    static constexpr int per = 4 / sizeof(T);  // elements in a unit
    static long count(long elements) { return (elements + per - 1) / per; }
};

template <typename T>
struct Dot;
template <>
struct Dot<float> {
    static vf add(vf acc, uint32_t a, vu b) {
        float x;
        memcpy(&x, &a, 4);
        return acc + x * (vf)b;
    }
};
template <>
struct Dot<uint16_t> {
    static vf add(vf acc, uint32_t a, vu b) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
        return acc + to_float(uint16_t(a)) * (vf)(b << 16) + to_float(uint16_t(a >> 16)) * (vf)(b & 0xffff0000u);
#endif
    }
};

// Sums start at zero and are added to C at the end: tens of thousands of softmax terms, each below half a unit in the
// last place of C, would otherwise all be lost.
template <typename T, int R>
inline void micro(const uint32_t* a, long row_stride, long k_stride, const uint32_t* b, long depth, float* c, long ldc,
                  bool accumulate) {
    vf acc[R][kRowVectors];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < kRowVectors; j++) acc[i][j] = vf{};
    for (long k = 0; k < depth; k++) {
        vu col[kRowVectors];
        for (int j = 0; j < kRowVectors; j++) col[j] = load<vu>(b + k * kPanel + j * kLanes);
#pragma GCC unroll 6
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < kRowVectors; j++)
                acc[i][j] = Dot<T>::add(acc[i][j], a[i * row_stride + k * k_stride], col[j]);
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < kRowVectors; j++) {
            float* out = c + i * ldc + j * kLanes;
            store(out, accumulate ? load<vf>(out) + acc[i][j] : acc[i][j]);
        }
}

// C [rows, panels * kPanel] (+)= A [rows, depth units] B. `block_stride` is the step of A between blocks of kRows rows.
template <typename T>
inline void gemm(const uint32_t* a, long block_stride, long row_stride, long k_stride, const uint32_t* b, long b_depth,
                 long depth, long rows, long panels, float* c, long ldc, bool accumulate) {
    for (long k0 = 0; k0 < depth; k0 += kInner) {
        const long part = std::min(kInner, depth - k0);
        const bool add = accumulate || k0 > 0;
        for (long p = 0; p < panels; p++) {
            const uint32_t* panel = b + (p * b_depth + k0) * kPanel;
            for (long i = 0; i < rows; i += kRows) {
                const uint32_t* block = a + (i / kRows) * block_stride + k0 * k_stride;
                float* out = c + i * ldc + p * kPanel;
                switch (std::min<long>(kRows, rows - i)) {
                    case 6: micro<T, 6>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    case 5: micro<T, 5>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    case 4: micro<T, 4>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    case 3: micro<T, 3>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    case 2: micro<T, 2>(block, row_stride, k_stride, panel, part, out, ldc, add); break;
                    default: micro<T, 1>(block, row_stride, k_stride, panel, part, out, ldc, add);
                }
            }
        }
    }
}

// A vector of units whose elements lie one row of `ld` apart.
inline vu column_units(const float* row, long) { return load<vu>(row); }
inline vu column_units(const uint16_t* row, long ld) { return widen(row) | (widen(row + ld) << 16); }

// One unit of up to `Units<T>::per` elements that lie `stride` apart; missing ones are zero.
template <typename T>
inline uint32_t unit(const T* p, long stride, long available) {
    T parts[Units<T>::per] = {};
    for (long i = 0; i < std::min<long>(Units<T>::per, available); i++) parts[i] = p[i * stride];
    uint32_t u;
    memcpy(&u, parts, 4);
    return u;
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
template <typename T>
inline void pack_panel_transposed(const T* source, long ld, long columns, long depth, uint32_t* panel) {
    constexpr int per = Units<T>::per;
    const long units = Units<T>::count(depth), whole = depth / per;
    for (long k = 0; k < units; k += kLanes)
        for (long j = 0; j < kPanel; j += kLanes) {
            const T* corner = source + j * ld + k * per;
            if (j + kLanes <= columns && k + kLanes <= whole) {
                vu rows[kLanes];
                for (int i = 0; i < kLanes; i++) rows[i] = load<vu>(corner + i * ld);
                swap_blocks<1>(rows, std::make_integer_sequence<int, kLanes>{});
                for (int i = 0; i < kLanes; i++) store(panel + (k + i) * kPanel + j, rows[i]);
                continue;
            }
            for (long c = k; c < std::min(k + kLanes, units); c++)
                for (long i = 0; i < kLanes; i++)
                    panel[c * kPanel + j + i] =
                        j + i < columns ? unit(corner + i * ld + (c - k) * per, 1, depth - c * per) : 0;
        }
}

// B panel of `units` from a matrix laid out as B itself (columns contiguous): weight [V, H] or hidden [N, H] for the
// gradients. Units past `depth` are zero.
template <typename T>
inline void pack_panel(const T* source, long ld, long columns, long depth, long units, uint32_t* panel) {
    constexpr int per = Units<T>::per;
    for (long k = 0; k < units; k++) {
        const T* row = source + k * per * ld;
        if (columns >= kPanel && (k + 1) * per <= depth) {
            for (long j = 0; j < kPanel; j += kLanes) store(panel + k * kPanel + j, column_units(row + j, ld));
        } else {
            for (long j = 0; j < kPanel; j++)
                panel[k * kPanel + j] = j < columns ? unit(row + j, ld, depth - k * per) : 0;
        }
    }
}

// A block of kRows rows from the transpose of a matrix (rows contiguous there): dz [N, V] read as dz^T.
// Result: block[k][kRows] units, so row_stride is 1 and k_stride is kRows.
template <typename T>
inline void pack_block_transposed(const T* source, long ld, long rows, long depth, uint32_t* block) {
    constexpr int per = Units<T>::per;
    const long units = Units<T>::count(depth);
    for (long k = 0; k < units; k++) {
        const T* row = source + k * per * ld;
        if (rows >= kLanes && (k + 1) * per <= depth) {
            const vu units_here = column_units(row, ld);
            memcpy(block + k * kRows, &units_here, std::min<long>(kRows, kLanes) * 4);
            for (long i = kLanes; i < kRows; i++) block[k * kRows + i] = unit(row + i, ld, per);
        } else {
            for (long i = 0; i < kRows; i++) block[k * kRows + i] = i < rows ? unit(row + i, ld, depth - k * per) : 0;
        }
    }
}

}  // namespace
}  // namespace dadpo
