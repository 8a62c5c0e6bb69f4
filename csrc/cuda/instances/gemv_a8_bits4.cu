#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1, 4>(const GemvForm&);
template GemvKernel gemv_kernel<true, 2, 4>(const GemvForm&);
template GemvKernel gemv_kernel<true, 4, 4>(const GemvForm&);

}  // namespace halfturn::cuda
