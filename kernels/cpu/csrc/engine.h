/* The kernels for one instruction set; the including file defines LANES and ENGINE, the name of its function table.
 *
 * padst_forward has two ways, for few tokens and for many. Few: each token's inputs are gathered once, threads share the outputs, and what
 * counts is to read the weights at full bandwidth. Many: threads take tiles of tokens, transposed to [inputs][tokens], so
 * that a weight is broadcast over vectors of tokens, and every structure runs from the same tile.
 */
#include "activation.h"
#include "block.h"
#include "dense.h"
#include "diag.h"
#include "engine_table.h"
#include "gradient.h"
#include "nm.h"
#include "parallel.h"
#include "rows.h"

#include <stdatomic.h>

/* What a structure gives: functions for constant value types. `rows`: sums of units [from, to) for `tokens` gathered rows
 * (1, 2, 4 or 8), for at most `few` of them. `tile`: the same from a transposed tile of `width` tokens (8, 16, 32 or 64; any multiple of LANES where
 * `widest` is given, the most tokens for this image), for `together` outputs at once. `pad`: what stands in front and
 * behind the inputs, `width` floats an input. */
struct kernel {
    int unit, few, margin, together;
    void (*rows)(const struct padst_image *, const float *x, long ldx, float *y, long ldy, int from, int to, int tokens);
    void (*tile)(const struct padst_image *, const float *tile, float *sums, int from, int to, int width);
    void (*pad)(const struct padst_image *, float *x, long width);
    int (*widest)(const struct padst_image *);
};

/* A structure's functions for one value type; by vectors of tokens where its tiles have 8, 16, 32 or 64. */
#define ROWS_INSTANCE(STRUCTURE, NAME, TYPE)                                                                           \
    static void STRUCTURE##_rows_##NAME(const struct padst_image *image, const float *x, long ldx, float *y, long ldy, \
                                        int from, int to, int tokens) {                                                \
        STRUCTURE##_rows(image, x, ldx, y, ldy, from, to, TYPE, tokens);                                               \
    }

#define VECTORS_INSTANCE(STRUCTURE, NAME, TYPE)                                                                        \
    ROWS_INSTANCE(STRUCTURE, NAME, TYPE)                                                                               \
    static void STRUCTURE##_tile_##NAME(const struct padst_image *image, const float *tile, float *sums, int from,     \
                                        int to, int width) {                                                           \
        if (width >= 64) STRUCTURE##_tile(image, tile, sums, from, to, TYPE, 64 / LANES);                              \
        else if (width >= 32) STRUCTURE##_tile(image, tile, sums, from, to, TYPE, 32 / LANES);                         \
        else if (width >= 16) STRUCTURE##_tile(image, tile, sums, from, to, TYPE, 16 / LANES);                         \
        else STRUCTURE##_tile(image, tile, sums, from, to, TYPE, 1);                                                   \
    }

#define WIDTH_INSTANCE(STRUCTURE, NAME, TYPE)                                                                          \
    ROWS_INSTANCE(STRUCTURE, NAME, TYPE)                                                                               \
    static void STRUCTURE##_tile_##NAME(const struct padst_image *image, const float *tile, float *sums, int from,     \
                                        int to, int width) {                                                           \
        STRUCTURE##_tile(image, tile, sums, from, to, width, TYPE);                                                    \
    }

VECTORS_INSTANCE(diag, f32, PADST_F32)
VECTORS_INSTANCE(diag, bf16, PADST_BF16)
VECTORS_INSTANCE(diag, f16, PADST_F16)
VECTORS_INSTANCE(nm, f32, PADST_F32)
VECTORS_INSTANCE(nm, bf16, PADST_BF16)
VECTORS_INSTANCE(nm, f16, PADST_F16)
WIDTH_INSTANCE(block, f32, PADST_F32)
WIDTH_INSTANCE(block, bf16, PADST_BF16)
WIDTH_INSTANCE(block, f16, PADST_F16)

static void rows_tile_f32(const struct padst_image *image, const float *tile, float *sums, int from, int to, int width) {
    if (width >= 64) rows_tile(image, tile, sums, from, to, 64 / LANES);
    else if (width >= 32) rows_tile(image, tile, sums, from, to, 32 / LANES);
    else if (width >= 16) rows_tile(image, tile, sums, from, to, 16 / LANES);
    else rows_tile(image, tile, sums, from, to, 1);
}

static void pad_diag(const struct padst_image *image, float *x, long width) { diag_pad(image, x, width); }
static void pad_nm(const struct padst_image *image, float *x, long width) { nm_pad(image, x, width); }
static void pad_block(const struct padst_image *image, float *x, long width) { block_pad(image, x, width); }
static void pad_nothing(const struct padst_image *image, float *x, long width) { (void)image, (void)x, (void)width; }

/* A multiple of three vectors whose tile fits the second-level cache, or three vectors. */
static int block_widest(const struct padst_image *image) {
    int step = 3 * LANES, width = BLOCK_WIDEST;
    while (width > step && (long)image->in_features * width * 4 > BLOCK_TILE_KIB * 1024L) width -= step;
    return width;
}

static const struct kernel kernels[PADST_STRUCTURES][3] = {
    [PADST_DIAG] = {{CHUNK, 8, CHUNK, ROW_TILE, diag_rows_f32, diag_tile_f32, pad_diag, NULL},
                    {CHUNK, 8, CHUNK, ROW_TILE, diag_rows_bf16, diag_tile_bf16, pad_diag, NULL},
                    {CHUNK, 8, CHUNK, ROW_TILE, diag_rows_f16, diag_tile_f16, pad_diag, NULL}},
    [PADST_NM] = {{NM_ROWS, 4, NM_MARGIN, NM_ROW_TILE, nm_rows_f32, nm_tile_f32, pad_nm, NULL},
                  {NM_ROWS, 4, NM_MARGIN, NM_ROW_TILE, nm_rows_bf16, nm_tile_bf16, pad_nm, NULL},
                  {NM_ROWS, 4, NM_MARGIN, NM_ROW_TILE, nm_rows_f16, nm_tile_f16, pad_nm, NULL}},
    [PADST_BLOCK] = {{STRIP, 8, BLOCK_MARGIN, ROW_TILE, block_rows_f32, block_tile_f32, pad_block, block_widest},
                     {STRIP, 8, BLOCK_MARGIN, ROW_TILE, block_rows_bf16, block_tile_bf16, pad_block, block_widest},
                     {STRIP, 8, BLOCK_MARGIN, ROW_TILE, block_rows_f16, block_tile_f16, pad_block, block_widest}},
    [PADST_ROWS] = {{1, 0, 0, ROWS_TOGETHER, NULL, rows_tile_f32, pad_nothing, NULL}},
};

#define SMALLEST_TILE (LANES < 16 ? 8 : LANES)
#define LARGEST_TILE 64

/* One call: what was asked, and how it is cut into tasks. */
struct call {
    const struct padst_image *image;
    const struct kernel *kernel;
    const void *x, *bias;
    void *y;
    int type, width, splits, activation;
    long tokens, ldx, ldy;
    float *gathered, *sums;
    atomic_int failed;
};

static long round_up(long value, long step) { return (value + step - 1) / step * step; }

static int units(const struct call *call) {
    return (call->image->out_features + call->kernel->unit - 1) / call->kernel->unit;
}

static void gather(const struct call *call, long token, float *to) {
    int in = call->image->in_features;
    const uint16_t *inverse = section(call->image, call->image->inv_in);
    if (call->type == PADST_F32) gather_row(call->x, token * in, PADST_F32, inverse, in, to);
    else if (call->type == PADST_BF16) gather_row(call->x, token * in, PADST_BF16, inverse, in, to);
    else gather_row(call->x, token * in, PADST_F16, inverse, in, to);
}

static float bias_of(const struct call *call, long output) {
    if (!call->bias) return 0;
    if (call->type == PADST_F32) return load_one(call->bias, output, PADST_F32);
    return load_one(call->bias, output, call->type == PADST_BF16 ? PADST_BF16 : PADST_F16);
}

static void scatter(const struct call *call, float *z, long token) {
    int out = call->image->out_features;
    const int32_t *perm = section(call->image, call->image->perm_out);
    const void *bias = call->bias;
    if (call->activation) {
        for (int r = 0; bias && r < out; r++) z[perm ? perm[r] : r] += bias_of(call, r);
        activate(z, out, 0, call->activation);
        bias = NULL;
    }
    if (call->type == PADST_F32) scatter_row(z, perm, out, PADST_F32, bias, call->y, token * out);
    else if (call->type == PADST_BF16) scatter_row(z, perm, out, PADST_BF16, bias, call->y, token * out);
    else scatter_row(z, perm, out, PADST_F16, bias, call->y, token * out);
}

static void transpose_in(const struct call *call, long token, int n, float *tile, int width) {
    int in = call->image->in_features;
    const uint16_t *inverse = section(call->image, call->image->inv_in);
    const char *x = (const char *)call->x + token * in * (long)type_bytes(call->type);
    if (call->type == PADST_F32) tile_in(x, n, in, PADST_F32, inverse, tile, width);
    else if (call->type == PADST_BF16) tile_in(x, n, in, PADST_BF16, inverse, tile, width);
    else tile_in(x, n, in, PADST_F16, inverse, tile, width);
}

static void transpose_out(const struct call *call, float *sums, int width, long token, int n, int first, int rows) {
    long out = call->image->out_features;
    const int32_t *perm = section(call->image, call->image->perm_out);
    const void *bias = call->bias;
    if (call->activation) {
        for (int r = 0; r < rows; r++)
            activate(sums + (long)(perm ? perm[r] : r) * width, width, bias_of(call, first + r), call->activation);
        bias = NULL;
    }
    char *y = (char *)call->y + token * out * (long)type_bytes(call->type);
    if (call->type == PADST_F32) tile_out(sums, width, n, rows, perm, PADST_F32, bias, y, out, first);
    else if (call->type == PADST_BF16) tile_out(sums, width, n, rows, perm, PADST_BF16, bias, y, out, first);
    else tile_out(sums, width, n, rows, perm, PADST_F16, bias, y, out, first);
}

/* -- few tokens ---------------------------------------------------------------------------------------------------- */

static void rows_task(void *context, int64_t index) {
    struct call *call = context;
    long all = units(call), from = all * index / call->splits, to = all * (index + 1) / call->splits;
    call->kernel->rows(call->image, call->gathered, call->ldx, call->sums, call->ldy, (int)from, (int)to, call->width);
}

/* A thread more for so many bytes of weights and each token: with fewer, waking it takes longer than
 * what it does (an Intel Xeon; on Zen 4 it comes to the same). */
#define BYTES_OF_THREAD (256L << 10)

static int worth_waking(const struct call *call, int threads) {
    long most = 1 + (long)call->image->bytes * call->tokens / BYTES_OF_THREAD;
    return threads < most ? threads : (int)most;
}

static int run_rows(struct call *call, int threads) {
    const struct kernel *kernel = call->kernel;
    threads = worth_waking(call, threads);
    /* Rows of a power of two bytes would all fall into the same cache sets. */
    call->ldx = round_up(call->image->in_features + 2 * kernel->margin, 16) + 16;
    call->ldy = round_up(call->image->out_features, kernel->unit) + 16;
    float *x = padst_scratch(SCRATCH_X, 8 * call->ldx * sizeof(float));
    call->sums = padst_scratch(SCRATCH_Y, 8 * call->ldy * sizeof(float));
    if (!x || !call->sums) return PADST_NO_MEMORY;
    call->gathered = x + kernel->margin;
    call->splits = threads < units(call) ? threads : units(call);
    for (long token = 0; token < call->tokens; token += call->width) {
        long n = call->tokens - token < kernel->few ? call->tokens - token : kernel->few;
        call->width = n > 4 ? 8 : n > 2 ? 4 : (int)n;
        for (int t = 0; t < call->width; t++) {
            float *row = call->gathered + t * call->ldx;
            if (t < n) gather(call, token + t, row);
            else memset(row, 0, call->image->in_features * sizeof(float));
            kernel->pad(call->image, row, 1);
        }
        padst_parallel(threads, call->splits, rows_task, call);
        for (int t = 0; t < n; t++) scatter(call, call->sums + t * call->ldy, token + t);
    }
    return PADST_OK;
}

/* -- many tokens --------------------------------------------------------------------------------------------------- */

static void tile_task(void *context, int64_t index) {
    struct call *call = context;
    const struct kernel *kernel = call->kernel;
    const struct padst_image *image = call->image;
    long token = index / call->splits * call->width, split = index % call->splits, all = units(call);
    int n = (int)(call->tokens - token < call->width ? call->tokens - token : call->width);
    int width = kernel->widest ? (int)round_up(n, SMALLEST_TILE) : call->width;
    int from = (int)(all * split / call->splits), to = (int)(all * (split + 1) / call->splits);
    /* Outputs that are permuted are read from all sums at once, others leave while they are in the cache. */
    int step = image->perm_out ? to - from : kernel->together / kernel->unit;
    float *tile = padst_scratch(SCRATCH_X, (image->in_features + 2L * kernel->margin) * width * sizeof(float));
    float *sums = padst_scratch(SCRATCH_Y, (long)step * kernel->unit * width * sizeof(float));
    if (!tile || !sums) {
        call->failed = 1;
        return;
    }
    float *inner = tile + (long)kernel->margin * width;
    transpose_in(call, token, n, inner, width);
    kernel->pad(image, inner, width);
    for (int unit = from; unit < to; unit += step) {
        int end = unit + step < to ? unit + step : to, first = unit * kernel->unit, last = end * kernel->unit;
        kernel->tile(image, inner, sums, unit, end, width);
        transpose_out(call, sums, width, token, n, first, (last < image->out_features ? last : image->out_features) - first);
    }
}

/* Tiles of any width: as few as `widest` allows, but one for each thread, of equal widths that leave no vectors over. */
static int even_width(const struct call *call, int widest, int threads) {
    long tiles = (call->tokens + widest - 1) / widest, step = 3 * LANES;
    tiles = round_up(tiles, threads);
    long width = round_up((call->tokens + tiles - 1) / tiles, SMALLEST_TILE);
    if (width > step) width = round_up(width, step);
    return (int)(width < widest ? width : widest);
}

/* Where rows are dense, wide tiles make the most of a weight; where they are not, narrow ones keep more inputs near. N:M
 * is decoded once a tile, which wants wide ones, as vectors of 16 do, of which a narrow tile would have only two. */
static int largest_tile(const struct padst_image *image) {
    if (image->structure == PADST_NM || LANES == 16) return LARGEST_TILE;
    double density = image->structure == PADST_DIAG ? diag_density(image) : rows_density(image);
    return density > 0.2 ? LARGEST_TILE : LARGEST_TILE / 2;
}

static int power_width(const struct call *call, int threads) {
    int width = largest_tile(call->image);
    while (width > SMALLEST_TILE && width / 2 >= call->tokens) width /= 2;
    /* Permuted outputs cannot be split between threads: narrower tiles then give each thread one. */
    while (call->image->perm_out && width > SMALLEST_TILE && (call->tokens + width - 1) / width < threads) width /= 2;
    return width;
}

static int run_tiles(struct call *call, int threads) {
    const struct kernel *kernel = call->kernel;
    int width = kernel->widest ? even_width(call, kernel->widest(call->image), threads) : power_width(call, threads);
    long tiles = (call->tokens + width - 1) / width;
    call->width = width;
    call->splits = tiles >= threads || call->image->perm_out ? 1 : (int)((threads + tiles - 1) / tiles);
    if (call->splits > units(call)) call->splits = units(call);
    padst_parallel(threads, tiles * call->splits, tile_task, call);
    return call->failed ? PADST_NO_MEMORY : PADST_OK;
}

static int forward(const struct padst_call *asked, const void *x, const void *bias, void *y) {
    const struct padst_image *image = asked->image;
    struct call call = {.image = image, .kernel = &kernels[image->structure][image->value_type], .x = x, .bias = bias,
                        .y = y, .type = asked->type, .tokens = asked->tokens, .activation = asked->activation};
    int threads = asked->threads < 1 ? 1 : asked->threads;
    if (!call.kernel->tile) return PADST_BAD_IMAGE;
    if (call.tokens <= call.kernel->few) return run_rows(&call, threads);
    return run_tiles(&call, threads);
}

const struct padst_engine ENGINE = {forward, gradient, dense};
