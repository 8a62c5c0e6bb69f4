#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 3>(From, bool, bool);
template GemvKernel gemv_kernel<true, 2, 3>(From, bool, bool);
template GemvKernel gemv_kernel<true, 4, 3>(From, bool, bool);

}  // namespace halfturn::cuda
