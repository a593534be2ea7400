#include "padst.h"

#include "engine_table.h"

static const struct padst_engine *const engines[PADST_ISAS] = {
    [PADST_PORTABLE] = &padst_engine_portable, [PADST_AVX2] = &padst_engine_avx2, [PADST_AVX512] = &padst_engine_avx512};

static int chosen = -1;

int padst_runs(int isa) {
    if (isa < 0 || isa >= PADST_ISAS || !engines[isa]->forward) return 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == PADST_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == PADST_AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return 1;
}

int padst_use_isa(int isa) {
    if (!padst_runs(isa)) return PADST_NOT_BUILT;
    chosen = isa;
    return PADST_OK;
}

/* AVX2 unless told otherwise: AVX-512 is for whoever has compared it with the portable path first. */
int padst_isa(void) {
    if (chosen < 0) chosen = padst_runs(PADST_AVX2) ? PADST_AVX2 : PADST_PORTABLE;
    return chosen;
}

int padst_run(const struct padst_call *call, const void *x, const void *bias, void *y) {
    const struct padst_image *header = call->image;
    if (header->magic != PADST_MAGIC || header->version != PADST_IMAGE_VERSION) return PADST_BAD_IMAGE;
    if (header->structure < 0 || header->structure >= PADST_STRUCTURES || call->type < PADST_F32 || call->type > PADST_F16 ||
        call->activation < PADST_NO_ACTIVATION || call->activation > PADST_SILU)
        return PADST_BAD_IMAGE;
    if (call->tokens > 0 && (!x || !y)) return PADST_NO_DATA;
    return engines[padst_isa()]->forward(call, x, bias, y);
}

int padst_forward(const void *image, const void *x, int type, const void *bias, void *y, int64_t tokens, int threads) {
    struct padst_call call = {image, tokens, type, threads, PADST_NO_ACTIVATION};
    return padst_run(&call, x, bias, y);
}

int padst_gradient(const void *image, const void *transposed, const float *x, const float *dy, float *gradient,
                   int64_t tokens, int threads) {
    const struct padst_image *header = image, *back = transposed;
    if (header->magic != PADST_MAGIC || header->version != PADST_IMAGE_VERSION) return PADST_BAD_IMAGE;
    if (back->magic != PADST_MAGIC || back->version != PADST_IMAGE_VERSION) return PADST_BAD_IMAGE;
    if (header->out_features != back->in_features || header->in_features != back->out_features) return PADST_BAD_IMAGE;
    if (tokens > 0 && (!x || !dy)) return PADST_NO_DATA;
    return engines[padst_isa()]->gradient(header, back, x, dy, gradient, tokens, threads < 1 ? 1 : threads);
}

int padst_dense(const void *image, void *weight, int type, int threads) {
    const struct padst_image *header = image;
    if (header->magic != PADST_MAGIC || header->version != PADST_IMAGE_VERSION) return PADST_BAD_IMAGE;
    if (header->structure < 0 || header->structure >= PADST_ROWS || type < PADST_F32 || type > PADST_F16)
        return PADST_BAD_IMAGE;
    return engines[padst_isa()]->dense(header, weight, type, threads < 1 ? 1 : threads);
}
