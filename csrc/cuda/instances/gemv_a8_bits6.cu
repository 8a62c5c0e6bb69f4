#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 6>(const GemvForm&);
template GemvKernel gemv_kernel<true, 2, 6>(const GemvForm&);
template GemvKernel gemv_kernel<true, 4, 6>(const GemvForm&);

}  // namespace halfturn::cuda
