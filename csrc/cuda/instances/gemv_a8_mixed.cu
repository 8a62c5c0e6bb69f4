#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, kMixed>(From);

}  // namespace halfturn::cuda
