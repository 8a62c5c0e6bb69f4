#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 8>(From, bool, bool);
template GemvKernel gemv_kernel<true, 2, 8>(From, bool, bool);
template GemvKernel gemv_kernel<true, 4, 8>(From, bool, bool);

}  // namespace halfturn::cuda
