/* Runs layers on whichever processor this is compiled for. Standard input holds records, one behind the other: a header, the
 * image, x [tokens, in] and the bias [out]; standard output gets y [tokens, out] and W [out, in] of each, all of type `type`. */
#include "padst.h"

#include <stdio.h>
#include <stdlib.h>

struct record {
    int64_t image_bytes, in, out, type, tokens;
};

static void *part(size_t bytes, int read) {
    void *found = aligned_alloc(PADST_ALIGN, (bytes + PADST_ALIGN - 1) / PADST_ALIGN * PADST_ALIGN);
    if (!found || (read && fread(found, 1, bytes, stdin) != bytes)) exit(1);
    return found;
}

static int run(const struct record *record) {
    size_t size = record->type == PADST_F32 ? 4 : 2, y_bytes = (size_t)(record->tokens * record->out) * size;
    size_t weight_bytes = (size_t)(record->out * record->in) * size;
    void *image = part((size_t)record->image_bytes, 1), *x = part((size_t)(record->tokens * record->in) * size, 1);
    void *bias = part((size_t)record->out * size, 1), *y = part(y_bytes, 0), *weight = part(weight_bytes, 0);
    int status = padst_forward(image, x, (int)record->type, bias, y, record->tokens, 1);
    if (!status) status = padst_dense(image, weight, (int)record->type, 1);
    if (!status && fwrite(y, 1, y_bytes, stdout) + fwrite(weight, 1, weight_bytes, stdout) != y_bytes + weight_bytes)
        status = 1;
    free(image), free(x), free(bias), free(y), free(weight);
    return status;
}

int main(void) {
    struct record record;
    while (fread(&record, sizeof record, 1, stdin) == 1)
        if (run(&record)) return 1;
    return ferror(stdin) ? 1 : 0;
}
