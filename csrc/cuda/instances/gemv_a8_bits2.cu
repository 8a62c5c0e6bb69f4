#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 2>(From, bool, bool);
template GemvKernel gemv_kernel<true, 2, 2>(From, bool, bool);
template GemvKernel gemv_kernel<true, 4, 2>(From, bool, bool);

}  // namespace halfturn::cuda
