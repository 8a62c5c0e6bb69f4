#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, kMixed>(From, bool, bool);
template GemvKernel gemv_kernel<true, 2, kMixed>(From, bool, bool);
template GemvKernel gemv_kernel<true, 4, kMixed>(From, bool, bool);

}  // namespace halfturn::cuda
