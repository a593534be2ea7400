/* Blocks: y[r] = sum over c of S[r, c] x[c], where S is zero outside `count` blocks of B x B on an aligned grid.
 *
 * Layout. Every block is cut into strips of STRIP rows, and a strip is stored column by column: STRIP neighbouring outputs
 * share one input, so a few vectors hold the sums of a strip while its columns pass by. A panel is the strips that fall
 * into the same STRIP outputs, which lie behind one another:
 *   values  [block rows][B / STRIP][blocks of the row][B][STRIP] of the value type
 *   indices int32 [count]: block columns, ascending within a block row, one for all strips of a block
 *   starts  int32 [block rows + 1]: the first block of each block row
 *   parameter[0] B, parameter[1] count
 * Edge blocks are padded with zeros; the inputs there are zeros too.
 */
#ifndef PADST_BLOCK_H
#define PADST_BLOCK_H

#include "layout.h"
#include "tile.h"

#define BLOCK_MARGIN 64      /* inputs that the last block of a row may touch beyond the end */
#define SEGMENT 128          /* columns of a panel whose inputs and weights stay in the first-level cache */
#define BLOCK_TILE_KIB 320   /* of a transposed tile: what leaves room for sums in a 512 KiB second-level cache */
#define BLOCK_WIDEST 96      /* tokens of a tile */

/* The strips of one panel. */
struct panel {
    const char *values;
    const int32_t *columns; /* block columns */
    int blocks, size;
};

INLINE struct panel block_panel(const struct padst_image *image, int index, int type) {
    const int32_t *starts = section(image, image->starts), *columns = section(image, image->indices);
    int size = image->parameter[0], strips = size / STRIP, row = index / strips;
    long first = starts[row], blocks = starts[row + 1] - first;
    long at = (first * strips + blocks * (index % strips)) * size * STRIP;
    return (struct panel){(const char *)section(image, image->values) + at * (long)type_bytes(type), columns + first,
                          (int)blocks, size};
}

/* Zeros behind the last input, as far as an edge block reaches. */
INLINE void block_pad(const struct padst_image *image, float *x, long width) {
    int in = image->in_features, size = image->parameter[0];
    memset(x + in * width, 0, (size_t)((in + size - 1) / size * size - in) * width * sizeof(float));
}

/* -- few tokens: a strip of weights is read once for `tokens` gathered rows ---------------------------------------- */

/* `unrolled` columns at a time, each with sums of its own: so many additions are in flight at once. */
INLINE void block_panel_rows(struct panel panel, const float *x, long ldx, float *y, long ldy, int type, int tokens,
                             int unrolled) {
    enum { VECTORS = STRIP / LANES };
    vec sum[8][VECTORS];
    UNROLL for (int s = 0; s < unrolled * tokens; s++) UNROLL for (int v = 0; v < VECTORS; v++) sum[s][v] = splat(0);
    const char *w = panel.values;
    for (int b = 0; b < panel.blocks; b++) {
        const float *input = x + (long)panel.columns[b] * panel.size;
        for (int c = 0; c < panel.size; c += unrolled, input += unrolled, w += unrolled * STRIP * type_bytes(type)) {
            if (tokens == 1 && worth_asking(type)) prefetch_ahead(w, unrolled * STRIP * (long)type_bytes(type));
            UNROLL for (int u = 0; u < unrolled; u++) UNROLL for (int t = 0; t < tokens; t++) {
                vec value = splat(input[t * ldx + u]);
                UNROLL for (int v = 0; v < VECTORS; v++)
                    sum[u * tokens + t][v] += load(w, u * STRIP + v * LANES, type) * value;
            }
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < VECTORS; v++) {
        UNROLL for (int u = 1; u < unrolled; u++) sum[t][v] += sum[u * tokens + t][v];
        storef(y + t * ldy + v * LANES, sum[t][v]);
    }
}

/* Few tokens: rows of gathered inputs [n][ldx], sums [n][ldy], for panels [from, to). */
INLINE void block_rows(const struct padst_image *image, const float *x, long ldx, float *y, long ldy, int from, int to,
                       int type, int tokens) {
    for (int index = from; index < to; index++) {
        struct panel panel = block_panel(image, index, type);
        float *sums = y + (long)index * STRIP;
        if (tokens == 1) block_panel_rows(panel, x, ldx, sums, ldy, type, 1, 4);
        else if (tokens == 2) block_panel_rows(panel, x, ldx, sums, ldy, type, 2, 2);
        else
            for (int t = 0; t < tokens; t += 4)
                block_panel_rows(panel, x + t * ldx, ldx, sums + t * ldy, ldy, type, 4, 1);
    }
}

/* -- many tokens: a small matrix product for each strip ------------------------------------------------------------ */

/* sums[row][.] += weights[column][row] * tile[column][.] for `rows` rows of a segment and `vectors` vectors of tokens.
 * Twelve sums keep both multipliers busy; the inputs of a column serve all rows, so loads are no limit. Whoever comes first
 * by a segment asks for the weights of the one behind it. */
INLINE void block_product(const float *weights, struct panel panel, const float *tile, float *sums, long width, int fresh,
                          int asks, int rows, int vectors) {
    vec sum[8][3];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        sum[r][v] = fresh ? splat(0) : loadf(sums + r * width + v * LANES);
    for (int b = 0; b < panel.blocks; b++) {
        const float *x = tile + (long)panel.columns[b] * panel.size * width;
        for (int c = 0; c < panel.size; c++, x += width, weights += STRIP) {
            vec input[3];
            if (asks) prefetch(weights + SEGMENT * STRIP);
            UNROLL for (int v = 0; v < vectors; v++) input[v] = loadf(x + v * LANES);
            UNROLL for (int r = 0; r < rows; r++) {
                vec weight = splat(weights[r]);
                UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += weight * input[v];
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++)
        storef(sums + r * width + v * LANES, sum[r][v]);
}

INLINE void block_strip(const float *weights, struct panel panel, const float *tile, float *sums, long width, int fresh,
                        int asks, int rows, int vectors) {
    for (int row = 0; row < STRIP; row += rows)
        block_product(weights + row, panel, tile, sums + row * width, width, fresh, asks && row == 0, rows, vectors);
}

/* All tokens of the tile, three vectors at a time; what is left goes by two or one, in as many sums as it takes. */
INLINE void block_segment(const float *weights, struct panel panel, const float *tile, float *sums, long width, int fresh) {
    const int rows = SUMS / 2; /* of three vectors: 12 sums, 24 with AVX-512 */
    for (long t = 0; t < width;) {
        long left = (width - t) / LANES;
        if (left == 3 || left > 4) {
            block_strip(weights, panel, tile + t, sums + t, width, fresh, t == 0, rows, 3);
            t += 3 * LANES;
        } else if (left > 1) {
            block_strip(weights, panel, tile + t, sums + t, width, fresh, t == 0, rows, 2);
            t += 2 * LANES;
        } else {
            block_strip(weights, panel, tile + t, sums + t, width, fresh, t == 0, 8, 1);
            t += LANES;
        }
    }
}

/* Sums [STRIP][width] of panels [from, to) from a transposed tile [in][width]. Weights of 16 bits are widened a segment
 * at a time, once for all tokens of the tile. */
INLINE void block_tile(const struct padst_image *image, const float *tile, float *sums, int from, int to, int width,
                       int type) {
    float widened[SEGMENT * STRIP];
    for (int index = from; index < to; index++, sums += (long)STRIP * width) {
        struct panel panel = block_panel(image, index, type);
        int step = SEGMENT / panel.size, all = panel.blocks;
        if (!all) memset(sums, 0, (size_t)STRIP * width * sizeof(float));
        for (int first = 0; first < all; first += step) {
            struct panel part = panel;
            long values = (long)panel.size * STRIP;
            part.columns += first;
            part.blocks = all - first < step ? all - first : step;
            part.values += first * values * (long)type_bytes(type);
            const float *weights = (const float *)part.values;
            if (type != PADST_F32) {
                for (long i = 0; i < part.blocks * values; i += LANES) storef(widened + i, load(part.values, i, type));
                weights = widened;
            }
            block_segment(weights, part, tile, sums, width, first == 0);
        }
    }
}
#endif
