/* Rows of any support, in compressed-sparse-row order, into an image of rows.h. */
#include "pack.h"

int64_t padst_pack_rows(const struct padst_layer *layer, int32_t count, const int32_t *row_starts,
                        const int32_t *columns, const float *values, void *image) {
    if (layer->in_features > UINT16_MAX || layer->out_features > UINT16_MAX || layer->value_type != PADST_F32)
        return PADST_NOT_BUILT;
    struct padst_image header = padst_begin(layer, PADST_ROWS);
    header.parameter[0] = count;
    header.values = reserve(&header.bytes, count * (int64_t)sizeof(float));
    header.indices = reserve(&header.bytes, count * (int64_t)sizeof(uint16_t));
    header.starts = reserve(&header.bytes, (layer->out_features + 1) * (int64_t)sizeof(int32_t));
    if (!image) return header.bytes;
    char *base = image;
    uint16_t *indices = (uint16_t *)(base + header.indices);
    padst_write_common(layer, &header, image);
    if (values) memcpy(base + header.values, values, (size_t)count * sizeof *values);
    memcpy(base + header.starts, row_starts, (size_t)(layer->out_features + 1) * sizeof(int32_t));
    for (int32_t e = 0; e < count; e++) indices[e] = (uint16_t)columns[e];
    return header.bytes;
}
