// SIMD helpers on GCC/Clang vector extensions: one source for SSE, AVX2, AVX-512 and NEON. The vector width is that of
// the instruction set this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace dadpo {
namespace {  // internal linkage: the linker must not merge the copies of different instruction sets

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRowVectors = 4;  // 6 x 4 accumulators in 32 registers
#elif defined(DADPO_SOFT_TILES)
constexpr int kLanes = 4, kRowVectors = 16;  // for the tests: panels as wide as those of the registers in software
#elif defined(__AVX__)
constexpr int kLanes = 8, kRowVectors = 2;  // 6 x 2 in 16 registers
#else
constexpr int kLanes = 4, kRowVectors = 2;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

template <typename V>
inline V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <typename V>
inline void store(void* p, V v) {
    memcpy(p, &v, sizeof v);
}
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

inline vf splat(float x) { return x - vf{}; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }  // b if either is NaN

inline float horizontal_max(vf v) {
    float r = v[0];
    for (int i = 1; i < kLanes; i++) r = v[i] > r ? v[i] : r;
    return r;
}
inline float horizontal_sum(vf v) {
    float lane[kLanes];
    store(lane, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

// exp(x) to about 1 ulp for x <= 88 (undefined above), exactly 0 below -87.3 and for -inf, NaN for NaN. Cody-Waite
// range reduction and the Cephes expf polynomial.
inline vf vexp(vf x) {
    const vf shifted = x * 1.44269504088896341f + 12582912.0f;  // + 1.5 * 2^23 rounds to an integer, in the low bits
    const vf n = shifted - 12582912.0f;
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vf scaled = (vf)((vi)p + ((vi)shifted << 23));
    return x < -87.3f ? vf{} : scaled;
}
inline vf vtanh(vf x) {
    const vf twice = x * 2.0f;
    return 1.0f - 2.0f / (vexp(twice > 88.0f ? splat(88.0f) : twice) + 1.0f);
}

// bfloat16 bits of x in the low half of each lane, rounded to nearest even; NaN stays NaN.
inline vu bf16_bits(vf x) {
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (vu)(x == x ? (vi)rounded : (vi)((bits >> 16) | 0x40u));
}
inline void store_bf16(uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
    store(p, _mm512_cvtneps_pbh((__m512)x));
#else
    store(p, __builtin_convertvector(bf16_bits(x), vh));
#endif
}
inline vu widen(const uint16_t* p) { return __builtin_convertvector(load<vh>(p), vu); }
inline vf load_bf16(const uint16_t* p) { return (vf)(widen(p) << 16); }
inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline void store_as(float* p, vf x) { store(p, x); }
inline void store_as(uint16_t* p, vf x) { store_bf16(p, x); }
inline vf load_as(const float* p) { return load<vf>(p); }
inline vf load_as(const uint16_t* p) { return load_bf16(p); }

}  // namespace
}  // namespace dadpo
