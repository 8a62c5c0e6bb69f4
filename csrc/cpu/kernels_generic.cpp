#define HALFTURN_ISA generic
#include "kernels_body.h"

namespace halfturn {
const Kernels kernels_generic = HALFTURN_KERNELS;
}
