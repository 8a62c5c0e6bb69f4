#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<false, 4>(const GemvForm&);

}  // namespace halfturn::cuda
