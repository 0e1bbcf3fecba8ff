// AMX's tile registers in software, by the names of the compiler's functions: found by `#include "soft_tiles.h"` where
// DADPO_SOFT_TILES is defined, so that any processor runs the source of `csrc/cpu/tiles.h`. Like the processor it
// refuses what does not fit, and it also refuses what the processor would let pass: a register that nothing was written
// to since the registers were shaped, and threads that keep their registers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace soft_tiles {

struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Registers {
    Config config;
    bool shaped = false, written[8] = {};
    alignas(64) uint32_t data[8][16][16];
    ~Registers() {
        if (shaped) fail("a thread ends with its tile registers in use");
    }
    [[noreturn]] static void fail(const char* reason) {
        fprintf(stderr, "soft_tiles: %s\n", reason);
        abort();
    }
    void use(int tile, bool read) const {
        if (!shaped) fail("registers are used before they are shaped");
        if (tile < 0 || tile > 7 || !config.rows[tile]) fail("a register without rows is used");
        if (read && !written[tile]) fail("a register is read that nothing was written to");
    }
};
inline Registers& registers() {
    static thread_local Registers all;
    return all;
}
inline float widen(uint32_t bits) {  // of the low half; denormals are zero
    bits <<= 16;
    if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

}  // namespace soft_tiles

inline void _tile_loadconfig(const void* from) {
    auto& r = soft_tiles::registers();
    memcpy(&r.config, from, sizeof r.config);
    if (r.config.palette != 1 || r.config.start_row) r.fail("an unknown palette");
    for (int i = 0; i < 8; i++) {
        if (r.config.rows[i] > 16 || r.config.row_bytes[i] > 64 || r.config.row_bytes[i] % 4) r.fail("a bad shape");
        if (!r.config.rows[i] != !r.config.row_bytes[i]) r.fail("rows without columns, or columns without rows");
        r.written[i] = false;
    }
    memset(r.data, 0xff, sizeof r.data);  // NaN
    r.shaped = true;
}
inline void _tile_release() { soft_tiles::registers().shaped = false; }
inline void _tile_zero(int tile) {
    auto& r = soft_tiles::registers();
    r.use(tile, false);
    memset(r.data[tile], 0, sizeof r.data[tile]);
    r.written[tile] = true;
}
inline void _tile_loadd(int tile, const void* base, long stride) {
    auto& r = soft_tiles::registers();
    r.use(tile, false);
    memset(r.data[tile], 0, sizeof r.data[tile]);
    for (int i = 0; i < r.config.rows[tile]; i++)
        memcpy(r.data[tile][i], static_cast<const char*>(base) + i * stride, r.config.row_bytes[tile]);
    r.written[tile] = true;
}
inline void _tile_stored(int tile, void* base, long stride) {
    auto& r = soft_tiles::registers();
    r.use(tile, true);
    for (int i = 0; i < r.config.rows[tile]; i++)
        memcpy(static_cast<char*>(base) + i * stride, r.data[tile][i], r.config.row_bytes[tile]);
}
inline void _tile_dpbf16ps(int c, int a, int b) {
    auto& r = soft_tiles::registers();
    for (int tile : {c, a, b}) r.use(tile, true);
    const auto& s = r.config;
    if (s.rows[c] != s.rows[a] || s.row_bytes[c] != s.row_bytes[b] || s.row_bytes[a] != 4 * s.rows[b])
        r.fail("a product of shapes that do not fit");
    for (int i = 0; i < s.rows[a]; i++)
        for (int j = 0; j < s.row_bytes[b] / 4; j++) {
            float sum;
            memcpy(&sum, &r.data[c][i][j], 4);
            for (int k = 0; k < s.rows[b]; k++) {
                const uint32_t x = r.data[a][i][k], y = r.data[b][k][j];
                sum += soft_tiles::widen(x & 0xffff) * soft_tiles::widen(y & 0xffff);
                sum += soft_tiles::widen(x >> 16) * soft_tiles::widen(y >> 16);
            }
            memcpy(&r.data[c][i][j], &sum, 4);
        }
}
