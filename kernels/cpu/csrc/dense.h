/* An image as the dense W [out, in] = S[perm_out][:, inverse of perm_in], for one instruction set.
 *
 * Eight rows of S become a tile [in][8], as a product of many tokens has its inputs: there an entry of any structure is a
 * store, and a column of a block or a run of diagonals a vector of them. The tile is transposed into rows of W, which
 * carries the input permutation, and writes every entry of W once, its zeros included. Threads share bands of outputs that
 * have their entries together: a chunk of diagonals, a panel of N:M, a block row.
 */
#ifndef PADST_DENSE_H
#define PADST_DENSE_H

#include "block.h"
#include "diag.h"
#include "nm.h"
#include "parallel.h"

#include <stdatomic.h>

#define DENSE_ROWS 8
#define DENSE_FRONT 8               /* columns of the tile in front of the first, which runs are lined up in */
#define DENSE_SLOTS 64              /* of N:M decoded at a time: they share the first-level cache with the tile */
#define DENSE_BEHIND BLOCK_MARGIN   /* and behind the last, for edge blocks and idle lanes; no less than NM_MARGIN */

struct dense {
    const struct padst_image *image;
    char *weight;
    int type;
    const int32_t *rows; /* [out]: the output that row r of S makes; NULL where it is r */
    atomic_int failed;
};

/* Rows [first, first + count) of S from their tile. */
INLINE void dense_rows(const struct dense *dense, const float *tile, long first, int count, int type) {
    const uint16_t *inverse = section(dense->image, dense->image->inv_in);
    long in = dense->image->in_features, c = 0;
    char *rows[DENSE_ROWS];
    for (int i = 0; i < count; i++)
        rows[i] = dense->weight + (dense->rows ? dense->rows[first + i] : first + i) * in * (long)type_bytes(type);
    for (; c + 8 <= in; c += 8) {
        v8 r[8];
        UNROLL for (int j = 0; j < 8; j++) r[j] = *(const v8 *)(tile + (inverse ? inverse[c + j] : c + j) * DENSE_ROWS);
        transpose8(r);
        UNROLL for (int i = 0; i < DENSE_ROWS; i++)
            if (i < count) store8(rows[i], c, type, r[i]);
    }
    for (; c < in; c++)
        for (int i = 0; i < count; i++)
            store_one(rows[i], c, type, tile[(inverse ? inverse[c] : c) * DENSE_ROWS + i]);
}

/* -- diagonals ----------------------------------------------------------------------------------------------------- */

/* runs[CHUNK + s]: the values of a chunk's run that starts at column s, `zeros` where none does. A run in front of the
 * first column is the end of one that wraps around. */
INLINE void dense_runs(const struct padst_image *image, long chunk, const char *zeros, const char **runs, int type) {
    const char *values = section(image, image->values);
    const uint16_t *indices = section(image, image->indices);
    const int32_t *starts = section(image, image->starts);
    int in = image->in_features;
    for (int s = 0; s < CHUNK + in + 8; s++) runs[s] = zeros;
    for (int32_t e = starts[chunk]; e < starts[chunk + 1]; e++)
        runs[indices[e]] = values + (long)e * CHUNK * (long)type_bytes(type);
    if (image->out_features <= in)
        for (int s = CHUNK - 1; s >= 0; s--) runs[s] = runs[s + in];
}

/* Rows [first, first + 8) of a chunk. Lane i of column c lies in the run that starts at c - first - i: three rounds of
 * blends line the lanes up, each taking those whose number has one bit from the vector that many columns before. */
INLINE void dense_diag_tile(const char *const *runs, int first, int in, float *tile, int type) {
    v8 e[9] = {{0}}, one[10] = {{0}}, two[12] = {{0}};
    for (long c = -DENSE_FRONT; c < in; c += 8) {
        UNROLL for (int j = 0; j < 8; j++) e[1 + j] = load8(runs[CHUNK + c - first + j], first, type);
        UNROLL for (int j = 0; j < 8; j++) one[2 + j] = SHUFFLE8(e[1 + j], e[j], 0, 9, 2, 11, 4, 13, 6, 15);
        UNROLL for (int j = 0; j < 8; j++) two[4 + j] = SHUFFLE8(one[2 + j], one[j], 0, 1, 10, 11, 4, 5, 14, 15);
        UNROLL for (int j = 0; j < 8; j++)
            *(v8 *)(tile + (c + j) * DENSE_ROWS) = SHUFFLE8(two[4 + j], two[j], 0, 1, 2, 3, 12, 13, 14, 15);
        e[0] = e[8];
        UNROLL for (int j = 0; j < 2; j++) one[j] = one[8 + j];
        UNROLL for (int j = 0; j < 4; j++) two[j] = two[8 + j];
    }
}

INLINE void dense_diag(struct dense *dense, long chunk, float *tile, int from, int to) {
    static const float zeros[CHUNK];
    const struct padst_image *image = dense->image;
    const char **runs = padst_scratch(SCRATCH_Y, (size_t)(CHUNK + image->in_features + 8) * sizeof *runs);
    if (!runs) {
        dense->failed = 1;
        return;
    }
    dense_runs(image, chunk, (const char *)zeros, runs, from);
    for (int first = 0; first < CHUNK; first += DENSE_ROWS) {
        long row = chunk * CHUNK + first, left = image->out_features - row;
        if (left <= 0) break;
        dense_diag_tile(runs, first, image->in_features, tile, from);
        dense_rows(dense, tile, row, left < DENSE_ROWS ? (int)left : DENSE_ROWS, to);
    }
}

/* -- N:M ----------------------------------------------------------------------------------------------------------- */

INLINE void dense_nm(const struct dense *dense, long panel, float *tile, int from, int to) {
    const struct padst_image *image = dense->image;
    const char *values = section(image, image->values);
    int n = image->parameter[0], last = image->in_features % image->parameter[1], lanes = nm_lanes(image, (int)panel);
    /* A short last group's slots that have no input hold zeros at the place of its last entry. */
    int slots = image->parameter[2] - (last && last < n ? n - last : 0);
    float decoded[DENSE_SLOTS * NM_ROWS];
    uint32_t places[DENSE_SLOTS * NM_ROWS];
    memset(tile, 0, (size_t)image->in_features * DENSE_ROWS * sizeof(float));
    for (int first = 0; first < slots; first += DENSE_SLOTS) {
        int count = slots - first < DENSE_SLOTS ? slots - first : DENSE_SLOTS;
        nm_decode(image, values + panel * NM_ROWS * nm_row_bytes(image, from), lanes, first, first + count, DENSE_ROWS,
                  from, decoded, places);
        for (int at = 0; at < count * NM_ROWS; at += NM_ROWS)
            UNROLL for (int lane = 0; lane < NM_ROWS; lane++) tile[places[at + lane] + lane] = decoded[at + lane];
    }
    dense_rows(dense, tile, panel * NM_ROWS, lanes, to);
}

/* -- blocks -------------------------------------------------------------------------------------------------------- */

INLINE void dense_block(const struct dense *dense, long block_row, float *tile, int from, int to) {
    const struct padst_image *image = dense->image;
    long size = image->parameter[0], width = (image->in_features + size - 1) / size * size;
    for (long first = 0; first < size; first += DENSE_ROWS) {
        long row = block_row * size + first, left = image->out_features - row;
        if (left <= 0) break;
        struct panel panel = block_panel(image, (int)(row / STRIP), from);
        memset(tile, 0, (size_t)width * DENSE_ROWS * sizeof(float));
        for (long b = 0; b < panel.blocks; b++)
            for (long c = 0; c < size; c++)
                *(v8 *)(tile + (panel.columns[b] * size + c) * DENSE_ROWS) =
                    load8(panel.values, (b * size + c) * STRIP + first % STRIP, from);
        dense_rows(dense, tile, row, left < DENSE_ROWS ? (int)left : DENSE_ROWS, to);
    }
}

/* ------------------------------------------------------------------------------------------------------------------ */

static int dense_band(const struct padst_image *image) {
    return image->structure == PADST_DIAG ? CHUNK : image->structure == PADST_NM ? NM_ROWS : image->parameter[0];
}

INLINE void dense_fill(struct dense *dense, long band, float *tile, int from, int to) {
    int structure = dense->image->structure;
    if (structure == PADST_DIAG) dense_diag(dense, band, tile, from, to);
    else if (structure == PADST_NM) dense_nm(dense, band, tile, from, to);
    else dense_block(dense, band, tile, from, to);
}

INLINE void dense_from(struct dense *dense, long band, float *tile, int to) {
    int from = dense->image->value_type;
    if (from == PADST_F32) dense_fill(dense, band, tile, PADST_F32, to);
    else if (from == PADST_BF16) dense_fill(dense, band, tile, PADST_BF16, to);
    else dense_fill(dense, band, tile, PADST_F16, to);
}

static void dense_task(void *context, int64_t band) {
    struct dense *dense = context;
    long columns = DENSE_FRONT + dense->image->in_features + DENSE_BEHIND;
    float *tile = padst_scratch(SCRATCH_X, (size_t)columns * DENSE_ROWS * sizeof *tile);
    if (!tile) {
        dense->failed = 1;
        return;
    }
    tile += DENSE_FRONT * DENSE_ROWS;
    if (dense->type == PADST_F32) dense_from(dense, band, tile, PADST_F32);
    else if (dense->type == PADST_BF16) dense_from(dense, band, tile, PADST_BF16);
    else dense_from(dense, band, tile, PADST_F16);
}

/* W into `weight`, row-major and of type `type`. */
static int dense(const struct padst_image *image, void *weight, int type, int threads) {
    struct dense call = {.image = image, .weight = weight, .type = type};
    const int32_t *perm_out = section(image, image->perm_out);
    long out = image->out_features, band = dense_band(image);
    if (perm_out) {
        int32_t *rows = padst_scratch(SCRATCH_INDEX, (size_t)out * sizeof *rows);
        if (!rows) return PADST_NO_MEMORY;
        for (int32_t r = 0; r < out; r++) rows[perm_out[r]] = r;
        call.rows = rows;
    }
    padst_parallel(threads, (out + band - 1) / band, dense_task, &call);
    return call.failed ? PADST_NO_MEMORY : PADST_OK;
}
#endif
