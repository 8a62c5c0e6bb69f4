#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 4>(From, bool, bool);
template GemvKernel gemv_kernel<true, 2, 4>(From, bool, bool);
template GemvKernel gemv_kernel<true, 4, 4>(From, bool, bool);

}  // namespace halfturn::cuda
