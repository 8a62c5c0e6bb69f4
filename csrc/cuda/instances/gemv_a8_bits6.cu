#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 6>(From);

}  // namespace halfturn::cuda
