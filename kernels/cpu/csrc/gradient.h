/* The gradient of a layer's values, on the support only: gradient[e] = sum over tokens of dz[row of e] * u[column of e],
 * where u = x[perm_in] are the inputs of S and dz the gradient of its outputs, dy through the inverse of perm_out.
 *
 * Tokens go by in tiles. Threads first bring a tile of both sides into the kernels' order, then share the rows, so that
 * every value is added to by one thread, and sums come out the same whatever the number of threads.
 */
#ifndef PADST_GRADIENT_H
#define PADST_GRADIENT_H

#include "block.h"
#include "parallel.h"
#include "rows.h"

struct gradient_call {
    const struct padst_image *image;
    const uint16_t *places[2]; /* of the features of x and of dy */
    const float *from[2];      /* x and dy at the tile's first token */
    float *tiles[2], *gradient;
    int features[2], n, splits, units, blocks;
};

/* -- blocks: tiles are strips of STRIP features, [strips][tokens + 1][STRIP] --------------------------------------- */

#define STRIPS_WIDTH 128                        /* tokens of a tile */
#define STRIP_STEP ((STRIPS_WIDTH + 1L) * STRIP) /* a token more, or all strips of a token fell into one set of the cache */
#define COLUMNS_TOGETHER (LANES == 16 ? 16 : 4)  /* as many as leave their sums in registers */

/* One token's features to their places among the strips of a tile that begins with that token. */
INLINE void strips_in(const float *x, int features, const uint16_t *places, float *tile) {
    int c = 0;
    if (!places)
        for (; c + STRIP <= features; c += STRIP, tile += STRIP_STEP) memcpy(tile, x + c, STRIP * sizeof *x);
    if (!places)
        for (int rest = 0; c < features; c++, rest++) tile[rest] = x[c];
    else
        for (; c < features; c++) tile[places[c] / STRIP * STRIP_STEP + places[c] % STRIP] = x[c];
}

/* gradient[column][row] += sum over `n` tokens of u[.][column] * d[.][row], for some columns of one strip of rows. Eight
 * sums, 16 with AVX-512, keep both multipliers busy. */
INLINE void block_gradient_part(const float *u, const float *d, int n, float *gradient) {
    enum { VECTORS = STRIP / LANES };
    vec sum[COLUMNS_TOGETHER][VECTORS];
    UNROLL for (int j = 0; j < COLUMNS_TOGETHER; j++) UNROLL for (int v = 0; v < VECTORS; v++)
        sum[j][v] = loadf(gradient + j * STRIP + v * LANES);
    for (int t = 0; t < n; t++, u += STRIP, d += STRIP) {
        vec row[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) row[v] = loadf(d + v * LANES);
        UNROLL for (int j = 0; j < COLUMNS_TOGETHER; j++) {
            vec column = splat(u[j]);
            UNROLL for (int v = 0; v < VECTORS; v++) sum[j][v] += column * row[v];
        }
    }
    UNROLL for (int j = 0; j < COLUMNS_TOGETHER; j++) UNROLL for (int v = 0; v < VECTORS; v++)
        storef(gradient + j * STRIP + v * LANES, sum[j][v]);
}

/* Panels [from, to) of STRIP rows; values lie as block.h says: [blocks of the panel][B][STRIP]. */
INLINE void block_gradient(const struct padst_image *image, const float *u, const float *d, int n, float *gradient,
                           int from, int to) {
    const char *values = section(image, image->values);
    for (int index = from; index < to; index++) {
        struct panel panel = block_panel(image, index, PADST_F32);
        float *at = gradient + (panel.values - values) / (long)sizeof *gradient;
        for (int b = 0; b < panel.blocks; b++)
            for (int c = 0; c < panel.size; c += COLUMNS_TOGETHER, at += COLUMNS_TOGETHER * STRIP) {
                long column = (long)panel.columns[b] * panel.size + c;
                block_gradient_part(u + column / STRIP * STRIP_STEP + column % STRIP, d + index * STRIP_STEP, n, at);
            }
    }
}

/* -- one tile of tokens -------------------------------------------------------------------------------------------- */

/* Eight tokens of one side. */
static void gradient_load(void *context, int64_t index) {
    const struct gradient_call *call = context;
    int side = (int)(index % 2), t = (int)(index / 2) * 8, features = call->features[side];
    const float *from = call->from[side] + (long)t * features;
    if (call->blocks)
        for (int i = 0; i < 8 && t + i < call->n; i++)
            strips_in(from + (long)i * features, features, call->places[side], call->tiles[side] + (t + i) * STRIP);
    else {
        int some = call->n - t < 0 ? 0 : call->n - t < 8 ? call->n - t : 8;
        tile_in8(from, some, features, PADST_F32, call->places[side], call->tiles[side] + t, GRADIENT_WIDTH);
    }
}

static void gradient_rows(void *context, int64_t index) {
    const struct gradient_call *call = context;
    int from = (int)(call->units * index / call->splits), to = (int)(call->units * (index + 1) / call->splits);
    if (call->blocks) block_gradient(call->image, call->tiles[0], call->tiles[1], call->n, call->gradient, from, to);
    else rows_gradient(call->image, call->tiles[0], call->tiles[1], call->gradient, from, to);
}

/* Room for a tile of one side, zero where an edge block reaches beyond the features. */
static float *gradient_tile(enum padst_scratch slot, int features, int width) {
    size_t bytes = (size_t)(features + BLOCK_MARGIN) * (size_t)(width + 1) * sizeof(float);
    float *tile = padst_scratch(slot, bytes);
    if (tile) memset(tile, 0, bytes);
    return tile;
}

/* gradient [values of the image] += that of all tokens; `transposed` is the image of the transposed layer. */
static int gradient(const struct padst_image *image, const struct padst_image *transposed, const float *x,
                    const float *dy, float *gradient, int64_t tokens, int threads) {
    struct gradient_call call = {.image = image, .gradient = gradient, .blocks = image->structure == PADST_BLOCK,
                                 .places = {section(image, image->inv_in), section(transposed, transposed->inv_in)},
                                 .features = {image->in_features, image->out_features}};
    int width = call.blocks ? STRIPS_WIDTH : GRADIENT_WIDTH;
    if (image->value_type != PADST_F32 || !(call.blocks || image->structure == PADST_ROWS)) return PADST_BAD_IMAGE;
    call.tiles[0] = gradient_tile(SCRATCH_X, image->in_features, width);
    call.tiles[1] = gradient_tile(SCRATCH_Y, image->out_features, width);
    if (!call.tiles[0] || !call.tiles[1]) return PADST_NO_MEMORY;
    call.units = call.blocks ? (image->out_features + image->parameter[0] - 1) / image->parameter[0] *
                                   (image->parameter[0] / STRIP)
                             : image->out_features;
    call.splits = threads == 1 ? 1 : 4 * threads < call.units ? 4 * threads : call.units;
    for (int64_t token = 0; token < tokens; token += width) {
        call.n = (int)(tokens - token < width ? tokens - token : width);
        call.from[0] = x + token * image->in_features;
        call.from[1] = dy + token * image->out_features;
        padst_parallel(threads, 2 * (width / 8), gradient_load, &call);
        padst_parallel(threads, call.splits, gradient_rows, &call);
    }
    return PADST_OK;
}
#endif
