/* N:M: y[r] = sum over slots s of values[r][s] * x[(s / N) * M + index[r][s]], index[r][s] < M <= 32.
 *
 * Layout. Output rows are cut into panels of NM_ROWS, one row a lane; the last panel has only the lanes that are left. A
 * panel's slots come in blocks of as many as have their indices in one 32-bit word (16, 8 or 4 slots of 2, 4 or 8 bits for
 * M <= 4, 16, 32; the first slot lowest): first a word for each lane, then the values [slots of the block][lanes]. The
 * last block has only the slots that are left. Few tokens: the M inputs of a group are in registers, and a permute
 * instruction chooses the input of each lane by its word; afterwards the word is shifted to the next slot.
 *   values  the panels, one behind the other
 *   starts  int32 [slots]: the first input of each slot's group
 *   parameter[0] N, [1] M, [2] the slots of a row, [3] the bits of an index
 */
#ifndef PADST_NM_H
#define PADST_NM_H

#include "layout.h"
#include "tile.h"

#define NM_MARGIN 32            /* inputs behind the last that a short last group's registers and idle lanes reach */
#define NM_ROW_TILE 768         /* outputs whose sums stay in the second-level cache while the panels of inputs pass by */
#define NM_PANEL_SLOTS 640      /* enough for every N and M: MOST_PANEL_FLOATS / (8 + 2 * NM_ROWS), a group's N more */

/* Picking is a loop over lanes where there is no permute instruction: unrolled blocks would be huge and no faster. */
#if defined(__AVX2__)
#define NM_UNROLL UNROLL
#else
#define NM_UNROLL _Pragma("GCC unroll 1")
#endif

INLINE void nm_pad(const struct padst_image *image, float *x, long width) {
    memset(x + image->in_features * width, 0, NM_MARGIN * width * sizeof(float));
}

/* Bytes of a row of a panel: its words and its values. */
INLINE long nm_row_bytes(const struct padst_image *image, int type) {
    int slots = image->parameter[2], word = 32 / image->parameter[3];
    return 4L * ((slots + word - 1) / word) + slots * (long)type_bytes(type);
}

/* -- few tokens ---------------------------------------------------------------------------------------------------- */

#if defined(__AVX2__)
INLINE v8 nm_pick8(const float *x, u8x32 word) {
    return (v8)_mm256_permutevar8x32_ps(_mm256_loadu_ps(x), (__m256i)word);
}

/* `high` in the lanes whose word has `bit` set: the blend looks at the sign. */
INLINE v8 nm_choose(v8 low, v8 high, u8x32 word, int bit) {
    return (v8)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)(word << (31 - bit)));
}
#endif

/* Each lane's x[word & (most - 1)], `most` 4, 8, 16 or 32: as many inputs are read. */
INLINE v8 nm_pick(const float *x, u8x32 word, int most) {
#if defined(__AVX512VL__)
    if (most == 16) return (v8)_mm256_permutex2var_ps(_mm256_loadu_ps(x), (__m256i)word, _mm256_loadu_ps(x + 8));
    if (most == 32)
        return (v8)_mm512_castps512_ps256(_mm512_permutex2var_ps(
            _mm512_loadu_ps(x), _mm512_castsi256_si512((__m256i)word), _mm512_loadu_ps(x + 16)));
#endif
#if defined(__AVX2__)
    if (most == 4) return (v8)_mm256_permutevar_ps(_mm256_broadcast_ps((const __m128 *)x), (__m256i)word);
    if (most == 8) return nm_pick8(x, word);
    v8 low = nm_choose(nm_pick8(x, word), nm_pick8(x + 8, word), word, 3);
    if (most == 16) return low;
    return nm_choose(low, nm_choose(nm_pick8(x + 16, word), nm_pick8(x + 24, word), word, 3), word, 4);
#else
    v8 picked;
    for (int lane = 0; lane < NM_ROWS; lane++) picked[lane] = x[word[lane] & (uint32_t)(most - 1)];
    return picked;
#endif
}

/* The first `slots` slots of a block, for `tokens` rows of inputs. Neighbouring slots go to different sums of a token,
 * 4 / tokens of them, so that no addition waits for the one before. */
INLINE void nm_block(const char *block, const int32_t *starts, const float *x, long ldx, v8 *sum, int lanes, int slots,
                     int type, int most, int tokens) {
    const int bits = nm_index_bits(most);
    u8x32 word = *(const u8x32 *)block;
    NM_UNROLL for (int s = 0; s < 32 / bits; s++) {
        if (s >= slots) break;
        v8 value = load8(block + 4 * lanes, (long)s * lanes, type);
        UNROLL for (int t = 0; t < tokens; t++)
            sum[(s * tokens + t) & 3] += value * nm_pick(x + t * ldx + starts[s], word, most);
        word >>= bits;
    }
}

INLINE void nm_panel(const struct padst_image *image, const char *panel, const float *x, long ldx, float *y, long ldy,
                     int lanes, int type, int most, int tokens) {
    const int bits = nm_index_bits(most), word = 32 / bits;
    const int32_t *starts = section(image, image->starts);
    const long full = NM_ROWS * (4 + word * (long)type_bytes(type)), size = full / NM_ROWS * lanes;
    int slots = image->parameter[2], s = 0;
    v8 sum[4] = {{0}, {0}, {0}, {0}};
    if (lanes == NM_ROWS)
        for (; s + word <= slots; s += word, panel += full) {
            prefetch_ahead(panel, full);
            nm_block(panel, starts + s, x, ldx, sum, NM_ROWS, word, type, most, tokens);
        }
    for (; s < slots; s += word, panel += size)
        nm_block(panel, starts + s, x, ldx, sum, lanes, slots - s, type, most, tokens);
    if (tokens == 1) *(v8 *)y = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    else if (tokens == 2) *(v8 *)y = sum[0] + sum[2], *(v8 *)(y + ldy) = sum[1] + sum[3];
    else UNROLL for (int t = 0; t < 4; t++) *(v8 *)(y + t * ldy) = sum[t];
}

INLINE int nm_lanes(const struct padst_image *image, int panel) {
    int left = image->out_features - panel * NM_ROWS;
    return left < NM_ROWS ? left : NM_ROWS;
}

INLINE void nm_panels(const struct padst_image *image, const float *x, long ldx, float *y, long ldy, int from, int to,
                      int type, int most, int tokens) {
    const char *values = section(image, image->values);
    long bytes = NM_ROWS * nm_row_bytes(image, type);
    for (int p = from; p < to; p++)
        nm_panel(image, values + p * bytes, x, ldx, y + p * NM_ROWS, ldy, nm_lanes(image, p), type, most, tokens);
}

INLINE void nm_groups(const struct padst_image *image, const float *x, long ldx, float *y, long ldy, int from, int to,
                    int type, int tokens) {
    int m = image->parameter[1];
    if (m <= 4) nm_panels(image, x, ldx, y, ldy, from, to, type, 4, tokens);
    else if (m <= 8) nm_panels(image, x, ldx, y, ldy, from, to, type, 8, tokens);
    else if (m <= 16) nm_panels(image, x, ldx, y, ldy, from, to, type, 16, tokens);
    else nm_panels(image, x, ldx, y, ldy, from, to, type, 32, tokens);
}

/* Few tokens, 1, 2 or 4: rows of gathered inputs [n][ldx] (padded by NM_MARGIN), sums [n][ldy] with room for panels. */
INLINE void nm_rows(const struct padst_image *image, const float *x, long ldx, float *y, long ldy, int from, int to,
                    int type, int tokens) {
    if (tokens == 1) nm_groups(image, x, ldx, y, ldy, from, to, type, 1);
    else if (tokens == 2) nm_groups(image, x, ldx, y, ldy, from, to, type, 2);
    else nm_groups(image, x, ldx, y, ldy, from, to, type, 4);
}

/* -- many tokens --------------------------------------------------------------------------------------------------- */

/* Slots [from, to) of a panel, slot by slot a value and a place in the tile for each lane. Idle lanes get places too,
 * within the margin. The same slots of the next panel are asked for: they come while this one's are multiplied. */
INLINE void nm_decode(const struct padst_image *image, const char *panel, int lanes, int from, int to, uint32_t width,
                      int type, float *values, uint32_t *places) {
    const int bits = image->parameter[3], word = 32 / bits;
    const uint32_t mask = ((1u << bits) - 1) & (NM_MARGIN - 1);
    const int32_t *starts = section(image, image->starts);
    const long step = lanes * (long)type_bytes(type), next = NM_ROWS * nm_row_bytes(image, type);
    const char *at = panel + from / word * (4L * lanes + word * step);
    u8x32 index = *(const u8x32 *)at >> (uint32_t)(from % word * bits);
    int within = from % word;
    at += 4 * lanes + within * step;
    for (int s = from; s < to; s++, within++, at += step, values += NM_ROWS, places += NM_ROWS) {
        if (within == word) {
            index = *(const u8x32 *)at;
            at += 4 * lanes;
            within = 0;
        }
        *(u8x32 *)places = ((index & mask) + (uint32_t)starts[s]) * width;
        *(v8 *)values = load8(at, 0, type);
        prefetch(at + next);
        index >>= (uint32_t)bits;
    }
}

/* sums += values[s] * tile[places[s]] for `rows` neighbouring lanes of decoded slots. */
INLINE void nm_tile_rows(const float *values, const uint32_t *places, int slots, const float *tile, float *sums,
                         int rows, int vectors, int fresh) {
    vec sum[SUMS];
    UNROLL for (int v = 0; v < rows * vectors; v++) sum[v] = fresh ? splat(0) : loadf(sums + v * LANES);
    for (int s = 0; s < slots; s++, values += NM_ROWS, places += NM_ROWS)
        UNROLL for (int row = 0; row < rows; row++) {
            const float *x = opaque(tile + places[row]);
            vec w = splat(values[row]);
            UNROLL for (int v = 0; v < vectors; v++) sum[row * vectors + v] += w * loadf(x + v * LANES);
        }
    UNROLL for (int v = 0; v < rows * vectors; v++) storef(sums + v * LANES, sum[v]);
}

/* Groups of inputs in a panel of them: as many as fit with their decoded slots, evenly shared out. */
INLINE int nm_panel_groups(const struct padst_image *image, int width) {
    int n = image->parameter[0], m = image->parameter[1], groups = image->parameter[2] / n;
    int fit = panel_floats((double)n / m) / (m * width + 2 * NM_ROWS * n), panels;
    if (fit < 1) fit = 1;
    panels = (groups + fit - 1) / fit;
    return (groups + panels - 1) / panels;
}

/* Sums of panels [from, to) of outputs from a transposed tile [in][width] padded by NM_MARGIN inputs. */
INLINE void nm_tile(const struct padst_image *image, const float *tile, float *sums, int from, int to, int type,
                    int vectors) {
    const int width = vectors * LANES, most = NM_ROW_TILE / NM_ROWS;
    const int rows = SUMS / vectors < NM_ROWS ? SUMS / vectors : NM_ROWS;
    const char *panels = section(image, image->values);
    const long bytes = NM_ROWS * nm_row_bytes(image, type);
    int slots = image->parameter[2], step = nm_panel_groups(image, width) * image->parameter[0];
    float values[NM_PANEL_SLOTS * NM_ROWS];
    uint32_t places[NM_PANEL_SLOTS * NM_ROWS];
    for (int group = from; group < to; group += most)
        for (int first = 0; first < slots; first += step) {
            int last = first + step < slots ? first + step : slots;
            for (int p = group; p < group + most && p < to; p++) {
                int lanes = nm_lanes(image, p);
                float *sum = sums + (long)(p - from) * NM_ROWS * width;
                nm_decode(image, panels + p * bytes, lanes, first, last, (uint32_t)width, type, values, places);
                for (int row = 0; row < lanes; row += rows)
                    nm_tile_rows(values + row, places + row, last - first, tile, sum + row * width, rows, vectors,
                                 first == 0);
            }
        }
}
#endif
