#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, kMixed>(const GemvForm&);
template GemvKernel gemv_kernel<true, 2, kMixed>(const GemvForm&);
template GemvKernel gemv_kernel<true, 4, kMixed>(const GemvForm&);

}  // namespace halfturn::cuda
