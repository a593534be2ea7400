/* Blocks from the checkpoint's order, values [count][B][B] with block-CSR indices, into the strips of block.h and back. */
#include "layout.h"
#include "pack.h"

/* Copy all values between the checkpoint's order and the image's; `pack` says whether into the image. */
static void copy_values(const struct padst_image *header, const int32_t *starts, char *image, char *values, int pack) {
    int64_t width = value_bytes(header->value_type), size = header->parameter[0], strips = size / STRIP;
    int64_t rows = (header->out_features + size - 1) / size;
    for (int64_t block_row = 0; block_row < rows; block_row++)
        for (int64_t strip = 0; strip < strips; strip++)
            for (int64_t block = starts[block_row]; block < starts[block_row + 1]; block++)
                for (int64_t column = 0; column < size; column++)
                    for (int64_t row = 0; row < STRIP; row++, image += width) {
                        char *value = values + ((block * size + strip * STRIP + row) * size + column) * width;
                        memcpy(pack ? image : value, pack ? value : image, (size_t)width);
                    }
}

int64_t padst_pack_block(const struct padst_layer *layer, int32_t block_size, int32_t count, const int32_t *row_offsets,
                         const int32_t *col_indices, const void *values, void *image) {
    struct padst_image header = padst_begin(layer, PADST_BLOCK);
    int64_t rows = (layer->out_features + block_size - 1) / block_size;
    int64_t area = (int64_t)block_size * block_size;
    header.parameter[0] = block_size;
    header.parameter[1] = count;
    header.values = reserve(&header.bytes, count * area * value_bytes(layer->value_type));
    header.indices = reserve(&header.bytes, count * (int64_t)sizeof(int32_t));
    header.starts = reserve(&header.bytes, (rows + 1) * (int64_t)sizeof(int32_t));
    if (!image) return header.bytes;
    char *base = image;
    padst_write_common(layer, &header, image);
    memcpy(base + header.indices, col_indices, (size_t)count * sizeof(int32_t));
    memcpy(base + header.starts, row_offsets, (size_t)(rows + 1) * sizeof(int32_t));
    copy_values(&header, row_offsets, base + header.values, (char *)values, 1);
    return header.bytes;
}

int padst_unpack_block(const struct padst_image *image, void *values, int32_t *row_offsets, int32_t *col_indices) {
    char *base = (char *)image;
    int64_t size = image->parameter[0], rows = (image->out_features + size - 1) / size;
    memcpy(row_offsets, base + image->starts, (size_t)(rows + 1) * sizeof(int32_t));
    memcpy(col_indices, base + image->indices, (size_t)image->parameter[1] * sizeof(int32_t));
    copy_values(image, row_offsets, base + image->values, values, 0);
    return PADST_OK;
}
