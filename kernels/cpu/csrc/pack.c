#include "pack.h"

struct padst_image padst_begin(const struct padst_layer *layer, int structure) {
    struct padst_image header = {.magic = PADST_MAGIC, .version = PADST_IMAGE_VERSION, .structure = structure,
                                 .value_type = layer->value_type, .out_features = layer->out_features,
                                 .in_features = layer->in_features, .bytes = sizeof header};
    if (layer->perm_in) {
        header.perm_in = reserve(&header.bytes, 4L * layer->in_features);
        header.inv_in = reserve(&header.bytes, 4L * layer->in_features);
    }
    if (layer->perm_out) header.perm_out = reserve(&header.bytes, 4L * layer->out_features);
    return header;
}

void padst_write_common(const struct padst_layer *layer, const struct padst_image *header, void *image) {
    char *base = image;
    memset(base, 0, (size_t)header->bytes);
    memcpy(base, header, sizeof *header);
    if (header->perm_in) {
        int32_t *inverse = (int32_t *)(base + header->inv_in);
        memcpy(base + header->perm_in, layer->perm_in, 4 * (size_t)layer->in_features);
        for (int32_t c = 0; c < layer->in_features; c++) inverse[layer->perm_in[c]] = c;
    }
    if (header->perm_out) memcpy(base + header->perm_out, layer->perm_out, 4 * (size_t)layer->out_features);
}

int padst_unpack_diag(const struct padst_image *image, void *values, int32_t *offsets);
int padst_unpack_nm(const struct padst_image *image, void *values, uint8_t *indices);

int padst_unpack(const void *image, void *values, void *first, void *second) {
    const struct padst_image *header = image;
    if (header->magic != PADST_MAGIC || header->version != PADST_IMAGE_VERSION) return PADST_BAD_IMAGE;
    (void)second;
    if (header->structure == PADST_DIAG) return padst_unpack_diag(header, values, first);
    if (header->structure == PADST_NM) return padst_unpack_nm(header, values, first);
    return PADST_BAD_IMAGE;
}
