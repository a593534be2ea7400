#include "parallel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

static padst_team team;

void padst_set_team(padst_team given) { team = given; }

struct work {
    _Atomic int64_t next;
    int64_t count;
    void (*task)(void *, int64_t);
    void *context;
};

static void take(void *data) {
    struct work *work = data;
    int64_t index;
    while ((index = atomic_fetch_add_explicit(&work->next, 1, memory_order_relaxed)) < work->count)
        work->task(work->context, index);
}

void padst_parallel(int threads, int64_t count, void (*task)(void *, int64_t), void *context) {
    struct work work = {0, count, task, context};
    if (threads > count) threads = (int)count;
    if (threads > 1 && team) team(take, &work, (unsigned)threads, 0);
    else take(&work);
}

struct buffers {
    void *start[SCRATCH_SLOTS];
    size_t bytes[SCRATCH_SLOTS];
};

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void release(void *data) {
    struct buffers *buffers = data;
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++) free(buffers->start[slot]);
    free(buffers);
}

static void make_key(void) { pthread_key_create(&key, release); }

void *padst_scratch(enum padst_scratch slot, size_t bytes) {
    pthread_once(&once, make_key);
    struct buffers *buffers = pthread_getspecific(key);
    if (!buffers) {
        buffers = calloc(1, sizeof *buffers);
        if (!buffers || pthread_setspecific(key, buffers)) return NULL;
    }
    if (buffers->bytes[slot] < bytes) {
        free(buffers->start[slot]);
        buffers->start[slot] = NULL;
        buffers->bytes[slot] = 0;
        if (posix_memalign(&buffers->start[slot], 4096, bytes + 4096)) return NULL;
        buffers->bytes[slot] = bytes + 4096;
    }
    return buffers->start[slot];
}
