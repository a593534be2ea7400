/* Rows: y[r] = sum over entries e of row r of values[e] * x[columns[e]], for a support of any shape.
 *
 * What sparse training runs on: a diagonal or N:M layer and its transpose, which is N:M no more, are rows alike. Written
 * for many tokens; few are padded to the smallest tile.
 *   values  float32 [entries], row by row, columns ascending
 *   indices uint16 [entries]: columns
 *   starts  int32 [out + 1]: the first entry of each row
 *   parameter[0] the number of entries
 */
#ifndef PADST_ROWS_H
#define PADST_ROWS_H

#include "tile.h"

#define ROWS_TOGETHER 256      /* rows whose sums stay in the second-level cache while the panels pass by */
#define GRADIENT_WIDTH 64      /* tokens of a tile of the gradient */

INLINE double rows_density(const struct padst_image *image) {
    return image->parameter[0] / ((double)image->out_features * image->in_features);
}

/* sums += values[e] * tile[columns[e]] for the entries from `e` on that lie below column `limit`; returns the next one. Two
 * at a time, each with sums of its own, where these leave registers for it: with few vectors a sum would wait for itself. */
INLINE int rows_part(const float *values, const uint16_t *columns, int e, int end, int limit, const float *tile,
                     float *sums, int vectors) {
    const int pair = 2 * vectors <= SUMS;
    vec sum[2][8];
    if (e == end || columns[e] >= limit) return e;
    UNROLL for (int v = 0; v < vectors; v++) sum[0][v] = loadf(sums + v * LANES), sum[1][v] = splat(0);
    for (; pair && e + 1 < end && columns[e + 1] < limit; e += 2)
        UNROLL for (int i = 0; i < 2; i++) {
            const float *x = opaque(tile + (long)columns[e + i] * (vectors * LANES));
            vec w = splat(values[e + i]);
            UNROLL for (int v = 0; v < vectors; v++) sum[i][v] += w * loadf(x + v * LANES);
        }
    for (; e < end && columns[e] < limit; e++) {
        const float *x = opaque(tile + (long)columns[e] * (vectors * LANES));
        vec w = splat(values[e]);
        UNROLL for (int v = 0; v < vectors; v++) sum[0][v] += w * loadf(x + v * LANES);
    }
    UNROLL for (int v = 0; v < vectors; v++) storef(sums + v * LANES, sum[0][v] + sum[1][v]);
    return e;
}

/* Sums [to - from][width] of rows [from, to) from a transposed tile [in][width], panel by panel of inputs. */
INLINE void rows_tile(const struct padst_image *image, const float *tile, float *sums, int from, int to, int vectors) {
    const float *values = section(image, image->values);
    const uint16_t *columns = section(image, image->indices);
    const int32_t *starts = section(image, image->starts);
    const int width = vectors * LANES, panel = panel_floats(rows_density(image)) / width;
    int32_t cursor[ROWS_TOGETHER];
    memset(sums, 0, (size_t)(to - from) * (size_t)width * sizeof(float));
    for (int group = from; group < to; group += ROWS_TOGETHER) {
        int end = group + ROWS_TOGETHER < to ? group + ROWS_TOGETHER : to;
        memcpy(cursor, starts + group, (size_t)(end - group) * sizeof *cursor);
        for (int limit = panel; limit - panel < image->in_features; limit += panel)
            for (int r = group; r < end; r++)
                cursor[r - group] = rows_part(values, columns, cursor[r - group], starts[r + 1], limit, tile,
                                              sums + (long)(r - from) * width, vectors);
    }
}

/* -- gradient of the values: gradient[e] += sum over tokens of d[row of e] * x[columns[e]] --------------------------- */

/* The sums of the lanes of four vectors. */
INLINE void add_lanes4(const vec *sum, float *four) {
    v8 s[4], pair[2], both;
    UNROLL for (int i = 0; i < 4; i++) {
#if LANES == 8
        s[i] = (v8)sum[i];
#else
        s[i] = *(const v8 *)&sum[i] + *((const v8 *)&sum[i] + 1);
#endif
    }
    UNROLL for (int i = 0; i < 2; i++)
        pair[i] = SHUFFLE8(s[2 * i], s[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
                  SHUFFLE8(s[2 * i], s[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    /* pair[0] holds sums of lanes 01 of s0, s1, then 23, 45, 67; likewise pair[1] of s2, s3. */
    both = SHUFFLE8(pair[0], pair[1], 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE8(pair[0], pair[1], 2, 3, 10, 11, 6, 7, 14, 15);
    UNROLL for (int i = 0; i < 4; i++) four[i] = both[i] + both[i + 4];
}

/* The entries of one row from `e` on that lie below column `limit`, four at a time; returns the next one. */
INLINE int rows_gradient_part(const uint16_t *columns, int e, int end, int limit, const float *tile, const float *d,
                              float *gradient) {
    enum { VECTORS = GRADIENT_WIDTH / LANES };
    vec own[VECTORS];
    int last = e;
    while (last < end && columns[last] < limit) last++;
    if (last == e) return e;
    UNROLL for (int v = 0; v < VECTORS; v++) own[v] = loadf(d + v * LANES);
    for (; e < last; e += 4) {
        vec sum[4];
        float four[4];
        UNROLL for (int i = 0; i < 4; i++) {
            const float *x = tile + (long)columns[e + i < last ? e + i : last - 1] * GRADIENT_WIDTH;
            sum[i] = own[0] * loadf(x);
            UNROLL for (int v = 1; v < VECTORS; v++) sum[i] += own[v] * loadf(x + v * LANES);
        }
        add_lanes4(sum, four);
        for (int i = 0; i < 4 && e + i < last; i++) gradient[e + i] += four[i];
    }
    return last;
}

/* Rows [from, to) from transposed tiles of the inputs and of the gradient of the outputs, both [features][width]. */
INLINE void rows_gradient(const struct padst_image *image, const float *x, const float *d, float *gradient, int from,
                          int to) {
    const uint16_t *columns = section(image, image->indices);
    const int32_t *starts = section(image, image->starts);
    const int panel = panel_floats(rows_density(image)) / GRADIENT_WIDTH;
    int32_t cursor[ROWS_TOGETHER];
    for (int group = from; group < to; group += ROWS_TOGETHER) {
        int end = group + ROWS_TOGETHER < to ? group + ROWS_TOGETHER : to;
        memcpy(cursor, starts + group, (size_t)(end - group) * sizeof *cursor);
        for (int limit = panel; limit - panel < image->in_features; limit += panel)
            for (int r = group; r < end; r++)
                cursor[r - group] = rows_gradient_part(columns, cursor[r - group], starts[r + 1], limit, x,
                                                       d + (long)r * GRADIENT_WIDTH, gradient);
    }
}
#endif
