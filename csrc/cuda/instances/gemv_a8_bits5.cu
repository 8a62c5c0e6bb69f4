#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 5>(From);

}  // namespace halfturn::cuda
