#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 5>(const GemvForm&);
template GemvKernel gemv_kernel<true, 2, 5>(const GemvForm&);
template GemvKernel gemv_kernel<true, 4, 5>(const GemvForm&);

}  // namespace halfturn::cuda
