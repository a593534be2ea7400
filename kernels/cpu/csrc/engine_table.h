/* What each instruction set's build of the kernels offers to padst.c. */
#ifndef PADST_ENGINE_TABLE_H
#define PADST_ENGINE_TABLE_H

#include "padst.h"

struct padst_engine {
    int (*forward)(const struct padst_call *call, const void *x, const void *bias, void *y);
    int (*gradient)(const struct padst_image *image, const struct padst_image *transposed, const float *x,
                    const float *dy, float *gradient, int64_t tokens, int threads);
    int (*dense)(const struct padst_image *image, void *weight, int type, int threads);
};

extern const struct padst_engine padst_engine_portable, padst_engine_avx2, padst_engine_avx512;
#endif
