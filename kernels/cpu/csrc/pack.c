#include "pack.h"

struct padst_image padst_begin(const struct padst_layer *layer, int structure) {
    struct padst_image header = {.magic = PADST_MAGIC, .version = PADST_IMAGE_VERSION, .structure = structure,
                                 .value_type = layer->value_type, .out_features = layer->out_features,
                                 .in_features = layer->in_features, .bytes = sizeof header};
    if (layer->perm_in) header.inv_in = reserve(&header.bytes, 2L * layer->in_features);
    if (layer->perm_out) header.perm_out = reserve(&header.bytes, 4L * layer->out_features);
    return header;
}

void padst_write_common(const struct padst_layer *layer, const struct padst_image *header, void *image) {
    char *base = image;
    memset(base, 0, (size_t)header->bytes);
    memcpy(base, header, sizeof *header);
    if (header->inv_in) {
        uint16_t *inverse = (uint16_t *)(base + header->inv_in);
        for (int32_t c = 0; c < layer->in_features; c++) inverse[layer->perm_in[c]] = (uint16_t)c;
    }
    if (header->perm_out) memcpy(base + header->perm_out, layer->perm_out, 4 * (size_t)layer->out_features);
}

int padst_unpack_diag(const struct padst_image *image, void *values, int32_t *offsets);
int padst_unpack_block(const struct padst_image *image, void *values, int32_t *row_offsets, int32_t *col_indices);
int padst_unpack_nm(const struct padst_image *image, void *values, uint8_t *indices);

int padst_unpack(const void *image, void *values, void *first, void *second) {
    const struct padst_image *header = image;
    if (header->magic != PADST_MAGIC || header->version != PADST_IMAGE_VERSION) return PADST_BAD_IMAGE;
    if (header->structure == PADST_DIAG) return padst_unpack_diag(header, values, first);
    if (header->structure == PADST_BLOCK) return padst_unpack_block(header, values, first, second);
    if (header->structure == PADST_NM) return padst_unpack_nm(header, values, first);
    return PADST_BAD_IMAGE;
}

void padst_unpack_permutations(const void *image, int32_t *perm_in, int32_t *perm_out) {
    const struct padst_image *header = image;
    const char *base = image;
    if (perm_in && header->inv_in) {
        const uint16_t *inverse = (const uint16_t *)(base + header->inv_in);
        for (int32_t c = 0; c < header->in_features; c++) perm_in[inverse[c]] = c;
    }
    if (perm_out && header->perm_out) memcpy(perm_out, base + header->perm_out, 4 * (size_t)header->out_features);
}
