/* The kernels for x86-64 with AVX2, FMA and F16C (Haswell, Zen and later). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#define __F16C__ 1
#define __AVX2__ 1
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LANES 8
#define ENGINE padst_engine_avx2
#include "engine.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "engine_table.h"
const struct padst_engine padst_engine_avx2 = {0};
#endif
