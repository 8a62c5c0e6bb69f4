#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 2>(const GemvForm&);
template GemvKernel gemv_kernel<true, 2, 2>(const GemvForm&);
template GemvKernel gemv_kernel<true, 4, 2>(const GemvForm&);

}  // namespace halfturn::cuda
