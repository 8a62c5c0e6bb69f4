#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 7>(From, bool, bool);
template GemvKernel gemv_kernel<true, 2, 7>(From, bool, bool);
template GemvKernel gemv_kernel<true, 4, 7>(From, bool, bool);

}  // namespace halfturn::cuda
