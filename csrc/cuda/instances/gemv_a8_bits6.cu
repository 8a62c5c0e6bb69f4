#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 6>(From, bool, bool);
template GemvKernel gemv_kernel<true, 2, 6>(From, bool, bool);
template GemvKernel gemv_kernel<true, 4, 6>(From, bool, bool);

}  // namespace halfturn::cuda
