/* Diagonals from the checkpoint's order, values [K][min(out, in)] and offsets [K], into the chunks of diag.h and back. */
#include "layout.h"
#include "pack.h"

#include <stdlib.h>

/* Inputs in front of the first and behind the last are padding of the gathered inputs: a run may start there. */
struct run {
    int32_t diagonal, start;
};

/* The runs that diagonal `k` leaves in the chunk of output rows from `row` on: one, or two around the wrap of out > in. */
static int runs_of(const struct padst_image *image, int32_t row, int32_t offset, int32_t k, struct run *found) {
    int32_t out = image->out_features, in = image->in_features;
    if (out <= in) {
        int64_t start = out == in ? (int64_t)row - offset : (int64_t)row + offset;
        *found = (struct run){k, (int32_t)(((start % in) + in) % in)};
        return 1;
    }
    int32_t start = row - offset < 0 ? row - offset + out : row - offset, count = 0;
    if (start < in) found[count++] = (struct run){k, start};
    if (start + CHUNK > out) found[count++] = (struct run){k, start - out};
    return count;
}

/* The index of the value that row `row + lane` of a run multiplies, or -1 where the run is outside the matrix. */
static int64_t value_index(const struct padst_image *image, const struct run *run, int32_t row, int lane) {
    int32_t out = image->out_features, in = image->in_features, column = run->start + lane;
    if (row + lane >= out) return -1;
    if (out < in) return (int64_t)run->diagonal * out + row + lane;
    if (out == in) return (int64_t)run->diagonal * in + column % in;
    return column < 0 || column >= in ? -1 : (int64_t)run->diagonal * in + column;
}

/* Stable counting sort of a chunk's runs by start; starts lie in (-CHUNK, in). `slots` has in + 2 CHUNK places. */
static void sort_runs(const struct run *from, int count, struct run *to, int32_t *slots, int32_t in) {
    memset(slots, 0, (size_t)(in + 2 * CHUNK) * sizeof *slots);
    for (int i = 0; i < count; i++) slots[from[i].start + CHUNK + 1]++;
    for (int32_t s = 1; s < in + 2 * CHUNK; s++) slots[s] += slots[s - 1];
    for (int i = 0; i < count; i++) to[slots[from[i].start + CHUNK]++] = from[i];
}

static int runs_of_chunk(const struct padst_image *image, int32_t chunk, int32_t count, const int32_t *offsets,
                         struct run *runs) {
    int found = 0;
    for (int32_t k = 0; k < count; k++) found += runs_of(image, chunk * CHUNK, offsets[k], k, runs + found);
    return found;
}

static void write_chunk(const struct padst_image *image, int32_t row, const struct run *runs, int count, const char *values,
                        char *to, uint16_t *indices) {
    int64_t size = value_bytes(image->value_type);
    for (int i = 0; i < count; i++) {
        indices[i] = (uint16_t)(runs[i].start + CHUNK);
        for (int lane = 0; lane < CHUNK; lane++) {
            int64_t index = value_index(image, &runs[i], row, lane);
            if (index >= 0) memcpy(to + ((int64_t)i * CHUNK + lane) * size, values + index * size, (size_t)size);
        }
    }
}

int64_t padst_pack_diag(const struct padst_layer *layer, int32_t count, const int32_t *offsets, const void *values,
                        void *image) {
    if (layer->in_features + 2 * CHUNK > UINT16_MAX) return PADST_NOT_BUILT;
    struct padst_image header = padst_begin(layer, PADST_DIAG);
    int32_t chunks = (layer->out_features + CHUNK - 1) / CHUNK;
    struct run *runs = malloc(4 * (size_t)count * sizeof *runs), *sorted = runs + 2 * (size_t)count;
    int32_t *slots = malloc((size_t)(layer->in_features + 2 * CHUNK) * sizeof *slots);
    int64_t entries = 0;
    if (!runs || !slots) entries = -1;
    for (int32_t chunk = 0; entries >= 0 && chunk < chunks; chunk++)
        entries += runs_of_chunk(&header, chunk, count, offsets, runs);
    if (entries >= 0) {
        header.parameter[0] = count;
        header.parameter[1] = chunks;
        header.values = reserve(&header.bytes, entries * CHUNK * value_bytes(layer->value_type));
        header.indices = reserve(&header.bytes, entries * (int64_t)sizeof(uint16_t));
        header.starts = reserve(&header.bytes, (chunks + 1) * (int64_t)sizeof(int32_t));
    }
    if (entries >= 0 && image) {
        char *base = image;
        int32_t *starts = (int32_t *)(base + header.starts);
        padst_write_common(layer, &header, image);
        for (int32_t chunk = 0; chunk < chunks; chunk++) {
            int found = runs_of_chunk(&header, chunk, count, offsets, runs);
            sort_runs(runs, found, sorted, slots, layer->in_features);
            write_chunk(&header, chunk * CHUNK, sorted, found, values,
                        base + header.values + (int64_t)starts[chunk] * CHUNK * value_bytes(layer->value_type),
                        (uint16_t *)(base + header.indices) + starts[chunk]);
            starts[chunk + 1] = starts[chunk] + found;
        }
    }
    free(runs);
    free(slots);
    return entries < 0 ? PADST_NO_MEMORY : header.bytes;
}

/* The diagonal that a run in a chunk belongs to. */
static int32_t offset_of(const struct padst_image *image, int32_t row, int32_t start) {
    int32_t out = image->out_features, in = image->in_features;
    int64_t offset = out < in ? (int64_t)start - row : (int64_t)row - start;
    int32_t size = out < in ? in : out;
    return (int32_t)((offset % size + size) % size);
}

/* Every diagonal meets row 0, or (out > in) input 0: its runs say all offsets, whose ranks are the places of the values. */
int padst_unpack_diag(const struct padst_image *image, void *values, int32_t *offsets) {
    const char *base = (const char *)image;
    const uint16_t *indices = (const uint16_t *)(base + image->indices);
    const int32_t *starts = (const int32_t *)(base + image->starts);
    int32_t size = image->out_features > image->in_features ? image->out_features : image->in_features, count = 0;
    int64_t width = value_bytes(image->value_type);
    int32_t *rank = calloc((size_t)size, sizeof *rank);
    if (!rank) return PADST_NO_MEMORY;
    for (int32_t chunk = 0; chunk < image->parameter[1]; chunk++)
        for (int32_t e = starts[chunk]; e < starts[chunk + 1]; e++)
            rank[offset_of(image, chunk * CHUNK, indices[e] - CHUNK)] = 1;
    for (int32_t offset = 0; offset < size; offset++)
        if (rank[offset]) {
            offsets[count] = offset;
            rank[offset] = count++;
        }
    for (int32_t chunk = 0; chunk < image->parameter[1]; chunk++)
        for (int32_t e = starts[chunk]; e < starts[chunk + 1]; e++) {
            int32_t row = chunk * CHUNK, start = indices[e] - CHUNK;
            struct run run = {rank[offset_of(image, row, start)], start};
            for (int lane = 0; lane < CHUNK; lane++) {
                int64_t index = value_index(image, &run, row, lane);
                if (index >= 0)
                    memcpy((char *)values + index * width, base + image->values + ((int64_t)e * CHUNK + lane) * width,
                           (size_t)width);
            }
        }
    free(rank);
    return count == image->parameter[0] ? PADST_OK : PADST_BAD_IMAGE;
}
