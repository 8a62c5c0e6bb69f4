#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 4>(From, bool);
template GemvKernel gemv_kernel<true, 2, 4>(From, bool);
template GemvKernel gemv_kernel<true, 4, 4>(From, bool);

}  // namespace halfturn::cuda
