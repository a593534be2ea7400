/* What all packers share: laying out an image's sections and writing its header. */
#ifndef PADST_PACK_H
#define PADST_PACK_H

#include "padst.h"

#include <stddef.h>
#include <string.h>

static inline int64_t value_bytes(int type) { return type == PADST_F32 ? 4 : 2; }

/* Reserve `bytes` at the end of the image that ends at *end; returns their offset. */
static inline int64_t reserve(int64_t *end, int64_t bytes) {
    int64_t offset = (*end + PADST_ALIGN - 1) / PADST_ALIGN * PADST_ALIGN;
    *end = offset + bytes;
    return offset;
}

/* A header for `layer` with its permutations' sections reserved; the caller reserves its own and sets `bytes`. */
struct padst_image padst_begin(const struct padst_layer *layer, int structure);

/* Write the header and the permutations with their inverses into the image; its padding becomes zero. */
void padst_write_common(const struct padst_layer *layer, const struct padst_image *header, void *image);
#endif
