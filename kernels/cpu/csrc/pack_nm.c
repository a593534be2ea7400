/* N:M from the checkpoint's order, values [out][G][N] and bit-packed indices, into the panels of nm.h and back. */
#include "layout.h"
#include "pack.h"

/* The checkpoint's indices of two inputs take a single bit. */
static int stored_bits(int32_t m) { return m <= 2 ? 1 : nm_index_bits(m); }

static int64_t words(const struct padst_image *image) {
    int word = 32 / image->parameter[3];
    return (image->parameter[2] + word - 1) / word;
}

/* Where a row's slot lies: its index in `shift` of *word on, its value at *value, both in bytes from the panels' start. */
struct place {
    int64_t word, value;
    int shift;
};

static struct place place_of(const struct padst_image *image, int32_t row, int32_t slot) {
    int32_t panel = row / NM_ROWS * NM_ROWS, lane = row - panel, left = image->out_features - panel;
    int64_t lanes = left < NM_ROWS ? left : NM_ROWS, size = value_bytes(image->value_type);
    int32_t bits = image->parameter[3], word = 32 / bits, within = slot % word;
    int64_t block = panel * (4 * words(image) + size * image->parameter[2]) + slot / word * lanes * (4 + size * word);
    return (struct place){block + 4 * lane, block + 4 * lanes + size * (within * lanes + lane), within * bits};
}

static void write_row(const struct padst_image *image, int32_t row, const uint8_t *indices, const char *values,
                      char *panels) {
    int bits = stored_bits(image->parameter[1]), size = (int)value_bytes(image->value_type);
    for (int32_t s = 0; s < image->parameter[2]; s++) {
        struct place at = place_of(image, row, s);
        uint32_t index = indices[s * bits / 8] >> (s * bits % 8) & ((1u << bits) - 1), word;
        memcpy(&word, panels + at.word, sizeof word);
        word |= index << at.shift;
        memcpy(panels + at.word, &word, sizeof word);
        memcpy(panels + at.value, values + (int64_t)s * size, (size_t)size);
    }
}

static void read_row(const struct padst_image *image, int32_t row, const char *panels, uint8_t *indices, char *values) {
    int bits = stored_bits(image->parameter[1]), size = (int)value_bytes(image->value_type);
    for (int32_t s = 0; s < image->parameter[2]; s++) {
        struct place at = place_of(image, row, s);
        uint32_t word;
        memcpy(&word, panels + at.word, sizeof word);
        indices[s * bits / 8] |= (uint8_t)((word >> at.shift & ((1u << bits) - 1)) << (s * bits % 8));
        memcpy(values + (int64_t)s * size, panels + at.value, (size_t)size);
    }
}

/* Bytes of a row of the checkpoint's indices and values. */
static int64_t row_indices(const struct padst_image *image) {
    return ((int64_t)image->parameter[2] * stored_bits(image->parameter[1]) + 7) / 8;
}

static int64_t row_values(const struct padst_image *image) {
    return image->parameter[2] * value_bytes(image->value_type);
}

int64_t padst_pack_nm(const struct padst_layer *layer, int32_t n, int32_t m, const uint8_t *indices,
                      const void *values, void *image) {
    struct padst_image header = padst_begin(layer, PADST_NM);
    int64_t out = layer->out_features, slots = (layer->in_features + m - 1) / m * n;
    header.parameter[0] = n;
    header.parameter[1] = m;
    header.parameter[2] = (int32_t)slots;
    header.parameter[3] = nm_index_bits(m);
    header.values = reserve(&header.bytes, out * (4 * words(&header) + row_values(&header)));
    /* The last panel is read as if it had all lanes. */
    if (out % NM_ROWS) header.bytes += NM_ROWS * (int64_t)sizeof(float);
    header.starts = reserve(&header.bytes, slots * (int64_t)sizeof(int32_t));
    if (image) {
        char *base = image;
        int32_t *starts = (int32_t *)(base + header.starts);
        padst_write_common(layer, &header, image);
        for (int32_t s = 0; s < slots; s++) starts[s] = s / n * m;
        for (int32_t row = 0; row < out; row++)
            write_row(&header, row, indices + row * row_indices(&header),
                      (const char *)values + row * row_values(&header), base + header.values);
    }
    return header.bytes;
}

int padst_unpack_nm(const struct padst_image *image, void *values, uint8_t *indices) {
    const char *panels = (const char *)image + image->values;
    memset(indices, 0, (size_t)(image->out_features * row_indices(image)));
    for (int32_t row = 0; row < image->out_features; row++)
        read_row(image, row, panels, indices + row * row_indices(image), (char *)values + row * row_values(image));
    return PADST_OK;
}
