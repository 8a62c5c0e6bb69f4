#define HALFTURN_ISA avx512
#include "kernels_body.h"

namespace halfturn {
const Kernels kernels_avx512 = HALFTURN_KERNELS;
}
