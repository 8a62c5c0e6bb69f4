#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 3>(const GemvForm&);
template GemvKernel gemv_kernel<true, 2, 3>(const GemvForm&);
template GemvKernel gemv_kernel<true, 4, 3>(const GemvForm&);

}  // namespace halfturn::cuda
