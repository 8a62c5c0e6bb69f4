#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 7>(const GemvForm&);
template GemvKernel gemv_kernel<true, 2, 7>(const GemvForm&);
template GemvKernel gemv_kernel<true, 4, 7>(const GemvForm&);

}  // namespace halfturn::cuda
