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

#define AHEAD 8192

#define MOST_PANEL_FLOATS 14336
/* Floats of a panel of a transposed tile that all rows are taken through before the next: 28 KiB, what stays in a 32 KiB
 * first-level cache; more where a row reads few inputs of a panel, and loading its sums anew would be the larger part. */
INLINE int panel_floats(double density) { return density > 0.2 ? 7168 : density > 0.07 ? 10240 : MOST_PANEL_FLOATS; }

/* Ask for the `bytes` (a constant) that come AHEAD bytes behind `at`: weights that are read once stream from memory faster
 * than the processor foresees, above all across the ends of pages. Not for the float32 values of blocks and diagonals, one
 * plain stream: there the requests cost more than they bring (Zen 3, huge pages, one token, 3072 x 768: 19 and 7 %). */
INLINE void prefetch_ahead(const char *at, long bytes) {
    UNROLL for (long line = 0; line < bytes; line += 64) prefetch(at + AHEAD + line);
}

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

/* Tokens [0, n) of x [n, in] as tile [in][width], as tile_in8; tokens n to width are zero. */
INLINE void tile_in(const void *x, int n, int in, int type, const uint16_t *inv_in, float *tile, int width) {
    for (int t = 0; t < width; t += 8) {
        int some = n - t < 0 ? 0 : n - t < 8 ? n - t : 8;
        tile_in8((const char *)x + (long)t * in * (long)type_bytes(type), some, in, type, inv_in, tile + t, width);
    }
}

/* y[t][r] = tile[perm_out[r]][t] + bias[r] for tokens [0, n) and outputs [0, rows); y has rows of `out`. */
INLINE void tile_out(const float *tile, int width, int n, int rows, const int32_t *perm_out, int type, const void *bias,
                     void *y, long out, long first) {
    for (int t = 0; t < n; t += 8) {
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
