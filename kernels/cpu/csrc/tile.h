/* Between rows of tokens and what kernels compute on: gathered rows, and transposed tiles [features][tokens].
 *
 * Permutations are carried on the way: column c of x goes to place inv_in[c], and results are read through perm_out. So a permutation costs an index, not a pass over memory.
 */
#ifndef PADST_TILE_H
#define PADST_TILE_H

#include "simd.h"

INLINE const void *section(const struct padst_image *image, int64_t offset) {
    return offset ? (const char *)image + offset : NULL;
}

#define AHEAD (LANES == 16 ? 4096 : 8192)

#define MOST_PANEL_FLOATS 14336
/* Floats of a panel of a transposed tile that all rows are taken through before the next: 28 KiB, what stays in a 32 KiB
 * first-level cache; more where a row reads few inputs of a panel, and loading its sums anew would be the larger part.
 * Fewer with AVX-512, whose tiles are wider, so that sums are a larger part of what passes by. */
INLINE int panel_floats(double density) {
    if (density > 0.2) return 7168;
    if (density > 0.07) return LANES == 16 ? 8704 : 10240;
    return LANES == 16 ? 10240 : MOST_PANEL_FLOATS;
}

/* Ask for the `bytes` (a constant) that come AHEAD bytes behind `at`: weights that are read once stream from memory faster
 * than the processor foresees, above all across the ends of pages. */
INLINE void prefetch_ahead(const char *at, long bytes) {
    UNROLL for (long line = 0; line < bytes; line += 64) prefetch(at + AHEAD + line);
}

/* Whether one token's weights are worth asking for ahead. The float32 values of blocks and diagonals are one plain stream,
 * and there it depends: with AVX-512 it brings 10 % (Emerald Rapids), else it costs 7 to 19 % (Zen 3; one token, 3072 x 768). */
INLINE int worth_asking(int type) { return LANES == 16 || type != PADST_F32; }

/* to[inv_in[c]] = x[c], inv_in NULL for the identity: stores, not loads, set the pace either way. */
INLINE void gather_row(const void *x, long row, int type, const uint16_t *inv_in, int in, float *to) {
    int c = 0;
    if (!inv_in)
        for (; c + 8 <= in; c += 8) *(v8 *)(to + c) = load8(x, row + c, type);
    for (; c < in; c++) to[inv_in ? inv_in[c] : c] = load_one(x, row + c, type);
}

/* y[r] = z[perm_out[r]] + bias[r]. */
INLINE void scatter_row(const float *z, const int32_t *perm_out, int out, int type, const void *bias, void *y, long row) {
    int r = 0;
    if (!perm_out)
        for (; r + 8 <= out; r += 8) {
            v8 value = *(const v8 *)(z + r);
            if (bias) value += load8(bias, r, type);
            store8(y, row + r, type, value);
        }
    for (; r < out; r++) {
        float value = z[perm_out ? perm_out[r] : r];
        if (bias) value += load_one(bias, r, type);
        store_one(y, row + r, type, value);
    }
}

/* Tokens [0, some) of x [some, in], at most 8, as columns of a tile [in][width], column c in row inv_in[c]; columns some to
 * 8 are zero. `width` and the tile's alignment are multiples of 8 floats. */
INLINE void tile_in8(const void *x, int some, int in, int type, const uint16_t *inv_in, float *tile, int width) {
    int c = 0;
    for (; c + 8 <= in; c += 8) {
        v8 r[8];
        /* Eight rows at once are more than the processor foresees: ask for their lines ahead. */
        if (c % 16 == 0)
            UNROLL for (int i = 0; i < 8; i++)
                prefetch((const char *)x + ((long)i * in + c) * (long)type_bytes(type) + 256);
        UNROLL for (int i = 0; i < 8; i++) r[i] = i < some ? load8(x, (long)i * in + c, type) : (v8){0};
        transpose8(r);
        UNROLL for (int i = 0; i < 8; i++) *(v8 *)(tile + (long)(inv_in ? inv_in[c + i] : c + i) * width) = r[i];
    }
    for (; c < in; c++) {
        float *to = tile + (long)(inv_in ? inv_in[c] : c) * width;
        for (int i = 0; i < 8; i++) to[i] = i < some ? load_one(x, (long)i * in + c, type) : 0.0f;
    }
}

#if LANES == 16
#define ASK_IN 512  /* bytes that reading x, and writing y, ask ahead for */
#define ASK_OUT 256

/* As tile_in8, sixteen tokens. */
INLINE void tile_in16(const void *x, int in, int type, const uint16_t *inv_in, float *tile, int width) {
    const void *rows[16];
    int c = 0;
    UNROLL for (int i = 0; i < 16; i++) rows[i] = (const char *)x + (long)i * in * (long)type_bytes(type);
    for (; c + 16 <= in; c += 16) {
        vec r[16];
        UNROLL for (int i = 0; i < 16; i++) prefetch((const char *)rows[i] + c * (long)type_bytes(type) + ASK_IN);
        transpose16(rows, c, type, r);
        UNROLL for (int i = 0; i < 16; i++) storef(tile + (long)(inv_in ? inv_in[c + i] : c + i) * width, r[i]);
    }
    for (; c < in; c++) {
        float *to = tile + (long)(inv_in ? inv_in[c] : c) * width;
        for (int i = 0; i < 16; i++) to[i] = load_one(rows[i], c, type);
    }
}

/* As tile_out for sixteen tokens, from where `tile` and y begin. Lines of y are asked for before they are written: sixteen
 * rows at once are more than the processor foresees. */
INLINE void tile_out16(const float *tile, int width, int rows, const int32_t *perm_out, int type, const void *bias,
                       void *y, long out, long first) {
    int r = 0;
    for (; r + 16 <= rows; r += 16) {
        const void *from[16];
        vec v[16], shift = bias ? load(bias, first + r, type) : splat(0);
        UNROLL for (int i = 0; i < 16; i++) from[i] = tile + (long)(perm_out ? perm_out[r + i] : r + i) * width;
        transpose16(from, 0, PADST_F32, v);
        UNROLL for (int i = 0; i < 16; i++)
            prefetch((const char *)y + (i * out + first + r) * (long)type_bytes(type) + ASK_OUT);
        UNROLL for (int i = 0; i < 16; i++) store16(y, i * out + first + r, type, v[i] + shift);
    }
    for (; r < rows; r++) {
        const float *from = tile + (long)(perm_out ? perm_out[r] : r) * width;
        float shift = bias ? load_one(bias, first + r, type) : 0.0f;
        for (int i = 0; i < 16; i++) store_one(y, i * out + first + r, type, from[i] + shift);
    }
}
#endif

/* Tokens [0, n) of x [n, in] as tile [in][width], as tile_in8; tokens n to width are zero. */
INLINE void tile_in(const void *x, int n, int in, int type, const uint16_t *inv_in, float *tile, int width) {
    int t = 0;
#if LANES == 16
    for (; t + 16 <= n; t += 16)
        tile_in16((const char *)x + (long)t * in * (long)type_bytes(type), in, type, inv_in, tile + t, width);
#endif
    for (; t < width; t += 8) {
        int some = n - t < 0 ? 0 : n - t < 8 ? n - t : 8;
        tile_in8((const char *)x + (long)t * in * (long)type_bytes(type), some, in, type, inv_in, tile + t, width);
    }
}

/* y[t][r] = tile[perm_out[r]][t] + bias[r] for tokens [0, n) and outputs [0, rows); y has rows of `out`. */
INLINE void tile_out(const float *tile, int width, int n, int rows, const int32_t *perm_out, int type, const void *bias,
                     void *y, long out, long first) {
    int t = 0;
#if LANES == 16
    for (; t + 16 <= n; t += 16)
        tile_out16(tile + t, width, rows, perm_out, type, bias, (char *)y + t * out * (long)type_bytes(type), out, first);
#endif
    for (; t < n; t += 8) {
        int some = n - t < 8 ? n - t : 8, r = 0;
        for (; r + 8 <= rows; r += 8) {
            v8 v[8];
            UNROLL for (int i = 0; i < 8; i++)
                v[i] = *(const v8 *)(tile + (long)(perm_out ? perm_out[r + i] : r + i) * width + t);
            transpose8(v);
            v8 shift = bias ? load8(bias, first + r, type) : (v8){0};
            UNROLL for (int i = 0; i < 8; i++)
                if (i < some) store8(y, (long)(t + i) * out + first + r, type, v[i] + shift);
        }
        for (; r < rows; r++) {
            const float *from = tile + (long)(perm_out ? perm_out[r] : r) * width + t;
            float shift = bias ? load_one(bias, first + r, type) : 0.0f;
            for (int i = 0; i < some; i++) store_one(y, (long)(t + i) * out + first + r, type, from[i] + shift);
        }
    }
}
#endif
