/* The C interface of padst's CPU kernels: sparse linear layers y = (S x[perm_in])[perm_out] + b.
 *
 * A layer is run from its *image*: one block of bytes that holds everything a kernel reads (values, indices and
 * permutations, in the kernel's own order), with offsets instead of pointers, so that it can be copied, kept in a
 * tensor and memory-mapped. padst_pack_* makes an image from the packed tensors of a checkpoint, padst_unpack gives these
 * back bit for bit. The layouts are described over the structures' own files (diag.h, nm.h, block.h, rows.h).
 *
 * Matrices are row-major. Tokens are rows: x [tokens, in], y [tokens, out]. Values are stored as float32, bfloat16 or
 * float16; all arithmetic is in float32. Functions return 0, or a negative padst_status.
 */
#ifndef PADST_H
#define PADST_H

#include <stdint.h>

enum padst_type { PADST_F32 = 0, PADST_BF16 = 1, PADST_F16 = 2 };

enum padst_structure { PADST_DIAG = 0, PADST_NM = 1, PADST_BLOCK = 2, PADST_ROWS = 3, PADST_STRUCTURES = 4 };

enum padst_isa { PADST_PORTABLE = 0, PADST_AVX2 = 1, PADST_AVX512 = 2, PADST_ISAS = 3 };

enum padst_status { PADST_OK = 0, PADST_NO_MEMORY = -1, PADST_BAD_IMAGE = -2, PADST_NOT_BUILT = -3, PADST_NO_DATA = -4 };

#define PADST_MAGIC 0x50414453u
#define PADST_IMAGE_VERSION 1
#define PADST_ALIGN 64

/* What every image begins with. Offsets are bytes from the image's start, multiples of PADST_ALIGN, 0 where absent. */
struct padst_image {
    uint32_t magic, version;
    int32_t structure, value_type;
    int32_t out_features, in_features;
    int64_t bytes;
    int64_t inv_in;   /* uint16 [in]: input c is column inv_in[c] of S (the inverse of perm_in) */
    int64_t perm_out; /* int32 [out]: output r is row perm_out[r] of S */
    int64_t values, indices, starts; /* see the structure's file */
    int32_t parameter[8];            /* likewise */
};

/* What all packers take: the shape, the values' type, and the permutations (NULL where there is none). */
struct padst_layer {
    int32_t out_features, in_features, value_type;
    const int32_t *perm_in, *perm_out;
};

#ifdef __cplusplus
extern "C" {
#endif

/* Packers: return the image's bytes and, where `image` is not NULL, write it there (aligned to PADST_ALIGN). The tensors
 * are those of the checkpoint format, unchecked. */
int64_t padst_pack_diag(const struct padst_layer *layer, int32_t count, const int32_t *offsets, const void *values,
                        void *image);
int64_t padst_pack_nm(const struct padst_layer *layer, int32_t n, int32_t m, const uint8_t *indices,
                      const void *values, void *image);
int64_t padst_pack_block(const struct padst_layer *layer, int32_t block_size, int32_t count,
                         const int32_t *row_offsets, const int32_t *col_indices, const void *values, void *image);
/* Any support, for training (rows.h): float32, at most 65535 features a side; `values` may be NULL. */
int64_t padst_pack_rows(const struct padst_layer *layer, int32_t count, const int32_t *row_starts,
                        const int32_t *columns, const float *values, void *image);

/* The checkpoint's tensors again: `values` and the integer tensors in the order of the packer's arguments (`first`:
 * offsets, indices or row_offsets; `second`: col_indices of blocks, else NULL). */
int padst_unpack(const void *image, void *values, void *first, void *second);

/* The permutations again, int32 [in] and [out]; either may be NULL, and is left alone where the layer has none. */
void padst_unpack_permutations(const void *image, int32_t *perm_in, int32_t *perm_out);

/* y = (S x[perm_in])[perm_out] + b for `tokens` rows on up to `threads` threads. x, bias (may be NULL) and y are all of
 * type `type`. */
int padst_forward(const void *image, const void *x, int type, const void *bias, void *y, int64_t tokens, int threads);

/* What the outputs may end in (activation.h). */
enum { PADST_NO_ACTIVATION, PADST_GELU, PADST_GELU_TANH, PADST_SILU };

/* The same, then the activation, from a descriptor that the caller keeps: with one token the arguments of a foreign call
 * take as long as a small layer's arithmetic, and these are the same from call to call. */
struct padst_call {
    const void *image;
    int64_t tokens;
    int32_t type, threads, activation;
};

int padst_run(const struct padst_call *call, const void *x, const void *bias, void *y);

/* The gradient of the values: for every value of `image` (blocks or rows, float32), in the image's order, adds the sum over
 * tokens of its input times the gradient dy of its output. x [tokens, in] and dy [tokens, out] are float32; `transposed` is
 * the image of the layer that leads back, S transposed with perm_in' = perm_out^-1 and perm_out' = perm_in^-1. */
int padst_gradient(const void *image, const void *transposed, const float *x, const float *dy, float *gradient,
                   int64_t tokens, int threads);

/* W [out, in] = S[perm_out][:, inverse of perm_in], row-major and of type `type`: what a dense product needs. */
int padst_dense(const void *image, void *weight, int type, int threads);

/* Which instruction set serves, whether this build and this machine have one, and choosing it (else PADST_NOT_BUILT). */
int padst_isa(void);
int padst_runs(int isa);
int padst_use_isa(int isa);

/* Give the function that runs fn(data) on `threads` threads at once: GOMP_parallel of the OpenMP library that the
 * process already has, so that there is one pool. Without one, everything runs on the calling thread. */
typedef void (*padst_team)(void (*fn)(void *), void *data, unsigned threads, unsigned flags);
void padst_set_team(padst_team team);

#ifdef __cplusplus
}
#endif
#endif
