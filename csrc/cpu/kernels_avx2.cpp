#define HALFTURN_ISA avx2
#include "kernels_body.h"

namespace halfturn {
const Kernels kernels_avx2 = HALFTURN_KERNELS;
}
