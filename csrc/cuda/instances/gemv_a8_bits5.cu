#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 5>(From, bool, bool);
template GemvKernel gemv_kernel<true, 2, 5>(From, bool, bool);
template GemvKernel gemv_kernel<true, 4, 5>(From, bool, bool);

}  // namespace halfturn::cuda
