/* Diagonals: y[r] = sum over o of S[r, c] x[c], where c = (r - o) mod out for out >= in, (r + o) mod in for out < in.
 *
 * Layout. Output rows are cut into chunks of CHUNK. Inside a chunk a diagonal is a run of CHUNK neighbouring inputs: an
 * entry (start, CHUNK values) with y[r0 + l] += values[l] * x[start + l]. Where the run leaves the matrix its values are
 * zero; where it wraps around (out <= in) the inputs are repeated behind their end. So a diagonal costs one index for
 * CHUNK values, and the inputs of a run need no gather.
 *   values  [entries][CHUNK] of the value type, entries of a chunk together, by rising start
 *   indices uint16 [entries]: start + CHUNK (inputs are padded by CHUNK on both sides)
 *   starts  int32 [chunks + 1]: the first entry of each chunk
 *   parameter[0] the number of diagonals K, parameter[1] of chunks
 */
#ifndef PADST_DIAG_H
#define PADST_DIAG_H

#include "layout.h"
#include "tile.h"

#define ROW_TILE 256      /* outputs whose sums stay in the second-level cache while the panels pass by */

/* Inputs in front of the first and behind the last, as the layout wants them: for out > in runs only touch zeros there. */
INLINE void diag_pad(const struct padst_image *image, float *x, long width) {
    int in = image->in_features, wraps = image->out_features <= in;
    memset(x - CHUNK * width, 0, CHUNK * width * sizeof(float));
    for (int c = 0; c < CHUNK; c++)
        if (wraps) memcpy(x + (in + c) * width, x + (c % in) * width, width * sizeof(float));
        else memset(x + (in + c) * width, 0, width * sizeof(float));
}

/* One chunk, `tokens` rows of gathered inputs at a time: sums stay in registers, weights are read once. */
INLINE void diag_chunk(const void *values, const uint16_t *starts, int entries, const float *x, long ldx, float *y,
                       long ldy, int rows, int type, int vectors, int tokens) {
    for (int part = 0; part < CHUNK && part < rows; part += vectors * LANES) {
        vec sum[4][8];
        UNROLL for (int v = 0; v < vectors; v++) UNROLL for (int t = 0; t < tokens; t++) sum[v][t] = splat(0);
        for (int e = 0; e < entries; e++) {
            long at = (long)e * CHUNK + part;
            const float *run = x + starts[e] - CHUNK + part;
            if (tokens == 1 && worth_asking(type))
                prefetch_ahead((const char *)values + at * (long)type_bytes(type), vectors * LANES * (long)type_bytes(type));
            UNROLL for (int v = 0; v < vectors; v++) {
                vec w = load(values, at + v * LANES, type);
                UNROLL for (int t = 0; t < tokens; t++) sum[v][t] += w * loadf(run + t * ldx + v * LANES);
            }
        }
        UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < vectors; v++)
            storef(y + t * ldy + part + v * LANES, sum[v][t]);
    }
}

INLINE void diag_chunks(const struct padst_image *image, const float *x, long ldx, float *y, long ldy, int from, int to,
                        int type, int vectors, int tokens) {
    const char *values = section(image, image->values);
    const uint16_t *indices = section(image, image->indices);
    const int32_t *starts = section(image, image->starts);
    for (int chunk = from; chunk < to; chunk++) {
        int first = starts[chunk], row = chunk * CHUNK;
        diag_chunk(values + (long)first * CHUNK * type_bytes(type), indices + first, starts[chunk + 1] - first, x, ldx,
                   y + row, ldy, image->out_features - row, type, vectors, tokens);
    }
}

/* Few tokens: rows of gathered inputs [n][ldx] (padded by CHUNK), sums [n][ldy], both with room for whole chunks. */
INLINE void diag_rows(const struct padst_image *image, const float *x, long ldx, float *y, long ldy, int from, int to,
                      int type, int tokens) {
    if (tokens == 1) diag_chunks(image, x, ldx, y, ldy, from, to, type, CHUNK / LANES, 1);
    else if (tokens == 2) diag_chunks(image, x, ldx, y, ldy, from, to, type, CHUNK / LANES, 2);
    else if (tokens <= 4) diag_chunks(image, x, ldx, y, ldy, from, to, type, CHUNK / LANES > 1 ? 2 : 1, 4);
    else diag_chunks(image, x, ldx, y, ldy, from, to, type, 1, 8);
}

/* `rows` neighbouring rows of a chunk over one panel. Their runs lie behind one another, as their inputs and sums do, so
 * SUMS vectors of sums are one stretch of memory whatever the width: sums += values[e * CHUNK + row] * tile[start[e]].
 * `ask`, where there is one, is a line of an entry that will be wanted, to be asked for with those behind it: one with each
 * entry, for more at once than the processor keeps count of would have to wait. */
INLINE void diag_tile_rows(const void *values, const uint16_t *indices, int entries, const float *tile, float *sums,
                           int type, int rows, int vectors, int fresh, const char *ask) {
    vec sum[SUMS];
    UNROLL for (int v = 0; v < rows * vectors; v++) sum[v] = fresh ? splat(0) : loadf(sums + v * LANES);
    for (int e = 0; e < entries; e++) {
        const float *x = opaque(tile + (long)indices[e] * (vectors * LANES));
        if (ask) prefetch(ask + e * CHUNK * (long)type_bytes(type));
        UNROLL for (int row = 0; row < rows; row++) {
            vec w = splat(load_one(values, (long)e * CHUNK + row, type));
            UNROLL for (int v = row * vectors; v < (row + 1) * vectors; v++) sum[v] += w * loadf(x + v * LANES);
        }
    }
    UNROLL for (int v = 0; v < rows * vectors; v++) storef(sums + v * LANES, sum[v]);
}

INLINE double diag_density(const struct padst_image *image) {
    return (double)image->parameter[0] / (image->out_features > image->in_features ? image->out_features : image->in_features);
}

/* Sums of at most ROW_TILE outputs, panel by panel of inputs. */
INLINE void diag_tile_group(const struct padst_image *image, const float *tile, float *sums, int from, int to, int type,
                            int vectors) {
    const char *values = section(image, image->values);
    const uint16_t *indices = section(image, image->indices);
    const int32_t *starts = section(image, image->starts);
    const long bytes = CHUNK * (long)type_bytes(type);
    int width = vectors * LANES, rows = SUMS / vectors;
    int panel = panel_floats(diag_density(image)) / width - CHUNK, last = image->in_features + 2 * CHUNK;
    int32_t cursor[ROW_TILE / CHUNK];
    for (int chunk = from; chunk < to; chunk++) cursor[chunk - from] = starts[chunk];
    for (int limit = panel; limit - panel < last; limit += panel)
        for (int chunk = from; chunk < to; chunk++) {
            int begin = cursor[chunk - from], end = begin, fresh = begin == starts[chunk];
            while (end < starts[chunk + 1] && indices[end] < limit) end++;
            if (end == begin && !fresh) continue;
            cursor[chunk - from] = end;
            /* The first rows ask for the next chunk's entries: what this one takes to compute, they need to come. */
            long line = chunk + 1 < to ? 0 : bytes;
            for (int row = 0; row < CHUNK; row += rows, line += 64)
                diag_tile_rows(values + begin * bytes + row * (long)type_bytes(type), indices + begin,
                               end - begin, tile + ((long)row - CHUNK) * width,
                               sums + ((long)(chunk - from) * CHUNK + row) * width, type, rows, vectors, fresh,
                               line < bytes ? values + cursor[chunk + 1 - from] * bytes + line : NULL);
        }
}

/* Sums of chunks [from, to) from a transposed tile [in][width] with CHUNK inputs of padding on both sides. */
INLINE void diag_tile(const struct padst_image *image, const float *tile, float *sums, int from, int to, int type,
                      int vectors) {
    const int step = ROW_TILE / CHUNK;
    for (int chunk = from; chunk < to; chunk += step)
        diag_tile_group(image, tile, sums + (long)(chunk - from) * CHUNK * vectors * LANES, chunk,
                        chunk + step < to ? chunk + step : to, type, vectors);
}
#endif
