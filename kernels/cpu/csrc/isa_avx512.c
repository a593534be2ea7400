/* The kernels for x86-64 with AVX-512 (F, BW, DQ, VL): vectors of 16 floats. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define LANES 16
#define ENGINE padst_engine_avx512
#include "engine.h"
#else
#include "engine_table.h"
const struct padst_engine padst_engine_avx512 = {0};
#endif
