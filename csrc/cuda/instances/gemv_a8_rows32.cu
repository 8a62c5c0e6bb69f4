#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 4>(const GemvForm&);

}  // namespace halfturn::cuda
