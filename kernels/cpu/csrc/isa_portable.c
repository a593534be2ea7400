/* The kernels as the compiler makes them without being told of any vector unit: every other build is tested against it. */
#define LANES 8
#define ENGINE padst_engine_portable
#include "engine.h"
