/* Vectors of floats, for whichever instruction set the including file was told to compile for.
 *
 * `vec` has LANES floats (8, with AVX-512 16). Everything is written in the vector extensions that GCC and Clang share,
 * so that it also compiles to plain C, SSE or NEON; intrinsics stand only where the extensions have no word for the
 * instruction. Functions take the type of stored values as an argument that is constant after inlining.
 */
#ifndef PADST_SIMD_H
#define PADST_SIMD_H

#include "padst.h"

#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#define UNROLL _Pragma("GCC unroll 16")
#define SUMS LANES /* vectors of sums that stay in registers: half of them, 16 with AVX-512 and else 8 */

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t u8x32 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t u8x16 __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint64_t u64x4 __attribute__((vector_size(32), aligned(8), may_alias));
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE8
#define SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, (u8x32){__VA_ARGS__})
#endif

INLINE size_t type_bytes(int type) { return type == PADST_F32 ? 4 : 2; }

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* float16 to float32 without F16C: shift exponent and mantissa into place, then scale by 2^112, which also normalises
 * subnormals; infinities and NaNs get the exponent that the scaling cannot give them. */
INLINE float half_to_float(uint16_t half) {
    uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t bits = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
    if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;
    return bits_to_float(bits | (uint32_t)(half & 0x8000) << 16);
}

/* Rounds to nearest even, as torch does: by the bits, for the fp16 instructions are not everywhere. */
INLINE uint16_t float_to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000u) /* subnormal: adding 0.5 puts the rounded mantissa into the low bits */
        return (uint16_t)(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13));
}

INLINE uint16_t float_to_bfloat(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float load_one(const void *base, long index, int type) {
    if (type == PADST_F32) return ((const float *)base)[index];
    uint16_t half = ((const uint16_t *)base)[index];
    if (type == PADST_BF16) return bits_to_float((uint32_t)half << 16);
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    return half_to_float(half);
#endif
}

INLINE void store_one(void *base, long index, int type, float value) {
    if (type == PADST_F32) ((float *)base)[index] = value;
    else ((uint16_t *)base)[index] = type == PADST_BF16 ? float_to_bfloat(value) : float_to_half(value);
}

INLINE v8 load8(const void *base, long index, int type) {
    if (type == PADST_F32) return *(const v8 *)((const float *)base + index);
    const uint16_t *halves = (const uint16_t *)base + index;
#if defined(__AVX2__) /* GCC 12 makes five instructions of the conversion below */
    if (type == PADST_BF16)
        return (v8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)halves)), 16);
#endif
    if (type == PADST_BF16) return (v8)(__builtin_convertvector(*(const u8x16 *)halves, u8x32) << 16);
#if defined(__F16C__)
    return (v8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)halves));
#else
    v8 wide;
    for (int i = 0; i < 8; i++) wide[i] = half_to_float(halves[i]);
    return wide;
#endif
}

/* As float_to_bfloat. */
INLINE u8x16 floats_to_bfloats(v8 value) {
    u8x32 bits = (u8x32)value, missing = (u8x32)(value != value);
    u8x32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector((rounded & ~missing) | ((bits >> 16 | 0x40) & missing), u8x16);
}

INLINE void store8(void *base, long index, int type, v8 value) {
    if (type == PADST_F32) *(v8 *)((float *)base + index) = value;
    else if (type == PADST_BF16) *(u8x16 *)((uint16_t *)base + index) = floats_to_bfloats(value);
    else
#if defined(__F16C__)
        _mm_storeu_si128((__m128i *)((uint16_t *)base + index), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < 8; i++) store_one(base, index + i, type, value[i]);
#endif
}

/* LANES values from `index` on. */
INLINE vec load(const void *base, long index, int type) {
#if LANES == 8
    return (vec)load8(base, index, type);
#else
    if (type == PADST_F32) return *(const vec *)((const float *)base + index);
    const uint16_t *halves = (const uint16_t *)base + index;
    if (type == PADST_BF16) return (vec)(__builtin_convertvector(*(const hvec *)halves, uvec) << 16);
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)halves));
#else
    vec wide;
    for (int i = 0; i < LANES; i++) wide[i] = half_to_float(halves[i]);
    return wide;
#endif
#endif
}

INLINE vec loadf(const float *p) { return *(const vec *)p; }
INLINE void storef(float *p, vec value) { *(vec *)p = value; }
/* Subtracting zero is nothing, a broadcast; adding zero is an addition, for it turns -0 into 0. */
INLINE vec splat(float value) { return value - (vec){0}; }
/* The same address, of which the compiler knows nothing: it keeps it in one register and reads beside it by constants, where
 * it otherwise takes an instruction to make the address of every read. */
INLINE const float *opaque(const float *p) {
    __asm__("" : "+r"(p));
    return p;
}
INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

/* Transpose 8 vectors of 8 floats in place. */
INLINE void transpose8(v8 *r) {
    v8 t[8], s[8];
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = SHUFFLE8(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[2 * i + 1] = SHUFFLE8(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        s[4 * i] = SHUFFLE8(t[4 * i], t[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        s[4 * i + 1] = SHUFFLE8(t[4 * i], t[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        s[4 * i + 2] = SHUFFLE8(t[4 * i + 1], t[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        s[4 * i + 3] = SHUFFLE8(t[4 * i + 1], t[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = SHUFFLE8(s[i], s[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = SHUFFLE8(s[i], s[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

#if LANES == 16
/* Four values from `at` on of each of four rows, a quarter of a vector each. */
INLINE __m512 load_quarters(const void *const *rows, long at, int type) {
    if (type == PADST_F32) {
        __m512 four = _mm512_castps128_ps512(_mm_loadu_ps((const float *)rows[0] + at));
        four = _mm512_insertf32x4(four, _mm_loadu_ps((const float *)rows[4] + at), 1);
        four = _mm512_insertf32x4(four, _mm_loadu_ps((const float *)rows[8] + at), 2);
        return _mm512_insertf32x4(four, _mm_loadu_ps((const float *)rows[12] + at), 3);
    }
    u64x4 four;
    UNROLL for (int i = 0; i < 4; i++) memcpy((char *)&four + 8 * i, (const uint16_t *)rows[4 * i] + at, 8);
    if (type == PADST_BF16) return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)four), 16);
    return _mm512_cvtph_ps((__m256i)four);
}

/* Sixteen values from `at` on of sixteen rows: r[i] is the i-th of every row. Loads put quarters of vectors together, which
 * leaves two shuffles a vector where a transposition in registers takes four; each row's line is read as a whole. */
INLINE void transpose16(const void *const *rows, long at, int type, vec *r) {
    UNROLL for (int j = 0; j < 4; j++) UNROLL for (int i = 0; i < 16; i += 4)
        r[i + j] = (vec)load_quarters(rows + j, at + i, type);
    UNROLL for (int i = 0; i < 16; i += 4) {
        __m512 a = (__m512)r[i], b = (__m512)r[i + 1], c = (__m512)r[i + 2], d = (__m512)r[i + 3];
        __m512 ab = _mm512_unpacklo_ps(a, b), cd = _mm512_unpacklo_ps(c, d);
        r[i] = (vec)_mm512_shuffle_ps(ab, cd, 0x44);
        r[i + 1] = (vec)_mm512_shuffle_ps(ab, cd, 0xee);
        ab = _mm512_unpackhi_ps(a, b), cd = _mm512_unpackhi_ps(c, d);
        r[i + 2] = (vec)_mm512_shuffle_ps(ab, cd, 0x44);
        r[i + 3] = (vec)_mm512_shuffle_ps(ab, cd, 0xee);
    }
}

INLINE void store16(void *base, long index, int type, vec value) {
    if (type == PADST_F32) storef((float *)base + index, value);
    else UNROLL for (int half = 0; half < 2; half++)
        store8(base, index + 8 * half, type, *((const v8 *)&value + half));
}
#endif
#endif
