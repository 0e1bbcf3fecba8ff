// Products of bfloat16 on AMX (Intel 64 manual, vol. 1, ch. 18): eight registers of 16 rows of 64 bytes, each a block of
// 16 x 16 float32 sums or of 16 rows of 16 units. Compiled where DADPO_TILES is defined; the tests compile it against
// registers in software, for processors that have none.
//
// A's units lie along its rows, and a panel of B is read as `pack_panel` leaves it: a register takes 16 units of depth,
// as far apart as the panel is wide. Sums are float32; denormal operands and results count as zero, as in AVX512-BF16.
#pragma once

#if defined(DADPO_SOFT_TILES)
#include "soft_tiles.h"
#else
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace dadpo {
namespace {

constexpr int kTile = 16;  // rows of a register, and units in one of its rows
constexpr int kTiledRows = 2 * kTile, kTiledColumns = 2 * kTile;  // of a block: four registers of sums

// All stores so far happen before what follows: GCC's loads of registers do not say that they read memory, nor that of
// the shape how much of it.
inline void settle(const void* p = nullptr) { __asm__ volatile("" ::"r"(p) : "memory"); }

// This thread's tile registers from the first `shape` on, given back at the end: PyTorch's products use them too.
class Tiles {
public:
    Tiles() = default;
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() {
        if (rows_) _tile_release();
    }
    // For blocks of `rows` rows whose slices are `units` deep; what the registers hold is lost if that changes.
    // Registers 0 to 3: sums, upper and lower rows by left and right columns. 4 and 5: A. 6 and 7: B.
    void shape(long rows, long units) {
        if (rows == rows_ && units == units_) return;
        rows_ = rows, units_ = units;
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        auto set = [&](int tile, long rows, long units) {
            config.rows[tile] = static_cast<uint8_t>(rows);
            config.row_bytes[tile] = static_cast<uint16_t>(rows ? 4 * units : 0);
        };
        const long upper = std::min<long>(kTile, rows), lower = rows - upper;
        for (int right = 0; right < 2; right++) {
            set(0 + right, upper, kTile);
            set(2 + right, lower, kTile);
            set(6 + right, units, kTile);
        }
        set(4, upper, units);
        set(5, lower, units);
        settle(&config);
        _tile_loadconfig(&config);
    }

private:
    long rows_ = 0, units_ = 0;
};

// Adds a slice of the depth, as deep as the registers are shaped, to the sums.
inline void add_slice(const uint32_t* a, long row_bytes, const uint32_t* b, long b_bytes, bool lower) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(7, b + kTile, b_bytes);
    _tile_loadd(4, a, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!lower) return;
    _tile_loadd(5, reinterpret_cast<const char*>(a) + kTile * row_bytes, row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

inline void store_sums(float* c, long row_bytes, bool lower) {
    _tile_stored(0, c, row_bytes);
    _tile_stored(1, c + kTile, row_bytes);
    if (!lower) return;
    c = reinterpret_cast<float*>(reinterpret_cast<char*>(c) + kTile * row_bytes);
    _tile_stored(2, c, row_bytes);
    _tile_stored(3, c + kTile, row_bytes);
}

inline void load_sums(const float* c, long row_bytes, bool lower) {
    _tile_loadd(0, c, row_bytes);
    _tile_loadd(1, c + kTile, row_bytes);
    if (!lower) return;
    c = reinterpret_cast<const float*>(reinterpret_cast<const char*>(c) + kTile * row_bytes);
    _tile_loadd(2, c, row_bytes);
    _tile_loadd(3, c + kTile, row_bytes);
}

// c [rows <= kTiledRows, kTiledColumns] (+)= A [rows, depth] times as many columns of a B panel. Sums start at zero and
// are added to C at the end, as in `micro`. `row_stride` and `b_stride` are in units.
inline void tiled_micro(Tiles& tiles, long rows, const uint32_t* a, long row_stride, const uint32_t* b, long b_stride,
                        long depth, float* c, long ldc, bool accumulate) {
    const bool lower = rows > kTile;
    const long whole = depth / kTile, rest = depth % kTile;
    settle();
    tiles.shape(rows, kTile);
    _tile_zero(0);
    _tile_zero(1);
    if (lower) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < whole; k++)
        add_slice(a + k * kTile, 4 * row_stride, b + k * kTile * b_stride, 4 * b_stride, lower);
    if (!rest && !accumulate) return store_sums(c, 4 * ldc, lower);

    alignas(64) float sums[kTiledRows * kTiledColumns];
    constexpr long kSums = 4 * kTiledColumns;
    store_sums(sums, kSums, lower);
    if (rest) {
        tiles.shape(rows, rest);
        load_sums(sums, kSums, lower);
        add_slice(a + whole * kTile, 4 * row_stride, b + whole * kTile * b_stride, 4 * b_stride, lower);
        store_sums(sums, kSums, lower);
    }
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < kTiledColumns; j += kLanes) {
            const vf sum = load<vf>(sums + i * kTiledColumns + j);
            store(c + i * ldc + j, accumulate ? load<vf>(c + i * ldc + j) + sum : sum);
        }
}

}  // namespace
}  // namespace dadpo
