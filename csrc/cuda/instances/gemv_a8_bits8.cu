#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 8>(const GemvForm&);
template GemvKernel gemv_kernel<true, 2, 8>(const GemvForm&);
template GemvKernel gemv_kernel<true, 4, 8>(const GemvForm&);

}  // namespace halfturn::cuda
