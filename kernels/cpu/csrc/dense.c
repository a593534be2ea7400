/* padst_dense: an image as the dense W [out, in] = S[perm_out][:, inverse of perm_in], written anew at every call.
 *
 * Threads share bands of outputs that have their entries together: a chunk of diagonals, a panel of N:M, a block row. A
 * band is zeroed, then filled a row or a few rows at a time, so that what is written stays in the first-level cache.
 */
#define LANES 8
#include "layout.h"
#include "parallel.h"
#include "simd.h"

#include <stdlib.h>

#define ROWS_AT_ONCE 8 /* of a chunk of diagonals: 8 rows of 768 floats fit a 32 KiB first-level cache */

struct fill {
    const struct padst_image *image;
    char *weight;
    int type;
    int32_t *columns; /* [CHUNK + in + CHUNK]: the input that column c - CHUNK of S multiplies, -1 outside the matrix */
    int32_t *rows;    /* [out]: the output that row r of S makes */
};

static const void *part(const struct padst_image *image, int64_t offset) { return (const char *)image + offset; }

/* Value `index` of `values` to place `at` of `to_values`; equal types are copied bit for bit. */
INLINE void put(void *to_values, long at, int to, const void *values, long index, int from) {
    if (from == to && to != PADST_F32) ((uint16_t *)to_values)[at] = ((const uint16_t *)values)[index];
    else store_one(to_values, at, to, load_one(values, index, from));
}

/* The row of W that row r of S goes to. */
INLINE char *row_of(const struct fill *fill, long r, int to) {
    return fill->weight + fill->rows[r] * (long)fill->image->in_features * (long)type_bytes(to);
}

INLINE void fill_diag(const struct fill *fill, int64_t chunk, int from, int to) {
    const int32_t *starts = part(fill->image, fill->image->starts);
    const uint16_t *indices = part(fill->image, fill->image->indices);
    const void *values = part(fill->image, fill->image->values);
    long left = fill->image->out_features - chunk * CHUNK, begin = starts[chunk], end = starts[chunk + 1];
    for (long lane = 0; lane < CHUNK && lane < left; lane += ROWS_AT_ONCE) {
        char *rows[ROWS_AT_ONCE];
        int count = left - lane < ROWS_AT_ONCE ? (int)(left - lane) : ROWS_AT_ONCE;
        for (int l = 0; l < count; l++) rows[l] = row_of(fill, chunk * CHUNK + lane + l, to);
        for (long e = begin; e < end; e++) {
            const int32_t *at = fill->columns + indices[e] + lane;
            long index = e * CHUNK + lane;
            if (count == ROWS_AT_ONCE) {
                UNROLL for (int l = 0; l < ROWS_AT_ONCE; l++)
                    if (at[l] >= 0) put(rows[l], at[l], to, values, index + l, from);
            } else
                for (int l = 0; l < count; l++)
                    if (at[l] >= 0) put(rows[l], at[l], to, values, index + l, from);
        }
    }
}

INLINE void fill_nm(const struct fill *fill, int64_t panel, int from, int to) {
    const struct padst_image *image = fill->image;
    const int32_t *columns = fill->columns + CHUNK, *groups = part(image, image->starts);
    int n = image->parameter[0], m = image->parameter[1], slots = image->parameter[2], bits = image->parameter[3];
    int each = 32 / bits, lanes = image->out_features - (int)panel * NM_ROWS, last = image->in_features % m;
    long size = (long)type_bytes(from), row_bytes = (slots + each - 1) / each * 4L + slots * size;
    const char *at = (const char *)part(image, image->values) + panel * NM_ROWS * row_bytes;
    if (lanes > NM_ROWS) lanes = NM_ROWS;
    /* A short last group's slots that have no input hold zeros at the place of its last entry. */
    int used = last && last < n ? slots - (n - last) : slots;
    for (int first = 0; first < slots; first += each) {
        int count = slots - first < each ? slots - first : each, some = used - first < count ? used - first : count;
        const char *values = at + 4L * lanes;
        for (int lane = 0; lane < lanes; lane++) {
            char *row = row_of(fill, panel * NM_ROWS + lane, to);
            uint32_t word;
            memcpy(&word, at + 4L * lane, sizeof word);
            for (int s = 0; s < some; s++, word >>= bits) {
                int column = groups[first + s] + (int)(word & ((1u << bits) - 1));
                put(row, columns[column], to, values, (long)s * lanes + lane, from);
            }
        }
        at = values + lanes * count * size;
    }
}

INLINE void fill_block(const struct fill *fill, int64_t block_row, int from, int to) {
    const struct padst_image *image = fill->image;
    const int32_t *starts = part(image, image->starts), *indices = part(image, image->indices);
    long size = image->parameter[0], strips = size / STRIP, begin = starts[block_row], end = starts[block_row + 1];
    const char *at = (const char *)part(image, image->values) + begin * size * size * (long)type_bytes(from);
    for (long strip = 0; strip < strips; strip++) {
        long first = block_row * size + strip * STRIP, left = image->out_features - first;
        int count = left < 0 ? 0 : left < STRIP ? (int)left : STRIP;
        for (long block = begin; block < end; block++, at += size * STRIP * (long)type_bytes(from)) {
            const int32_t *columns = fill->columns + CHUNK + indices[block] * size;
            long width = image->in_features - indices[block] * size;
            if (width > size) width = size;
            for (int l = 0; l < count; l++) {
                char *row = row_of(fill, first + l, to);
                for (long c = 0; c < width; c++) put(row, columns[c], to, at, c * STRIP + l, from);
            }
        }
    }
}

static int band_rows(const struct padst_image *image) {
    return image->structure == PADST_DIAG ? CHUNK : image->structure == PADST_NM ? NM_ROWS : image->parameter[0];
}

INLINE void fill_band(const struct fill *fill, int64_t band, int from, int to) {
    int structure = fill->image->structure;
    if (structure == PADST_DIAG) fill_diag(fill, band, from, to);
    else if (structure == PADST_NM) fill_nm(fill, band, from, to);
    else fill_block(fill, band, from, to);
}

INLINE void fill_from(const struct fill *fill, int64_t band, int to) {
    if (fill->image->value_type == PADST_F32) fill_band(fill, band, PADST_F32, to);
    else if (fill->image->value_type == PADST_BF16) fill_band(fill, band, PADST_BF16, to);
    else fill_band(fill, band, PADST_F16, to);
}

static void band_task(void *context, int64_t band) {
    const struct fill *fill = context;
    long rows = band_rows(fill->image), bytes = fill->image->in_features * (long)type_bytes(fill->type);
    for (long r = band * rows; r < (band + 1) * rows && r < fill->image->out_features; r++)
        memset(fill->weight + fill->rows[r] * bytes, 0, (size_t)bytes);
    if (fill->type == PADST_F32) fill_from(fill, band, PADST_F32);
    else if (fill->type == PADST_BF16) fill_from(fill, band, PADST_BF16);
    else fill_from(fill, band, PADST_F16);
}

/* Where columns and rows of S lie in W; columns beyond the matrix wrap around only where diagonals do. */
static void find_places(struct fill *fill) {
    const struct padst_image *image = fill->image;
    const uint16_t *inverse = part(image, image->inv_in);
    const int32_t *perm_out = part(image, image->perm_out);
    int32_t in = image->in_features, out = image->out_features, *columns = fill->columns + CHUNK;
    for (int32_t c = 0; c < in; c++) columns[image->inv_in ? inverse[c] : c] = c;
    for (int32_t c = 0; c < CHUNK; c++) columns[c - CHUNK] = -1;
    for (int32_t c = 0; c < CHUNK; c++) columns[in + c] = out <= in ? columns[c % in] : -1;
    for (int32_t r = 0; r < out; r++) fill->rows[image->perm_out ? perm_out[r] : r] = r;
}

int padst_dense(const void *given, void *weight, int type, int threads) {
    const struct padst_image *image = given;
    if (image->magic != PADST_MAGIC || image->version != PADST_IMAGE_VERSION) return PADST_BAD_IMAGE;
    if (image->structure < 0 || image->structure >= PADST_ROWS || type < PADST_F32 || type > PADST_F16)
        return PADST_BAD_IMAGE;
    long in = image->in_features, out = image->out_features;
    int32_t *columns = malloc((size_t)(in + out + 2 * CHUNK) * sizeof *columns);
    if (!columns) return PADST_NO_MEMORY;
    struct fill fill = {image, weight, type, columns, columns + in + 2 * CHUNK};
    find_places(&fill);
    padst_parallel(threads < 1 ? 1 : threads, (out + band_rows(image) - 1) / band_rows(image), band_task, &fill);
    free(columns);
    return PADST_OK;
}
