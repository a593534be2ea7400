/* Work shared between threads, and memory that each thread keeps from call to call. */
#ifndef PADST_PARALLEL_H
#define PADST_PARALLEL_H

#include "padst.h"

#include <stddef.h>

/* Run task(context, i) for 0 <= i < count on up to `threads` threads; whoever is free takes the next i. */
void padst_parallel(int threads, int64_t count, void (*task)(void *context, int64_t index), void *context);

enum padst_scratch { SCRATCH_X, SCRATCH_Y, SCRATCH_INDEX, SCRATCH_SLOTS };

/* At least `bytes` bytes of this thread's own memory, page-aligned, contents undefined; NULL when there are none. One
 * buffer a slot: it stays valid until the same thread asks for the same slot again. */
void *padst_scratch(enum padst_scratch slot, size_t bytes);
#endif
