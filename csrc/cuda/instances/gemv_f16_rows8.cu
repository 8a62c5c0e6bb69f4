#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<false, 1>(From, bool, bool);

}  // namespace halfturn::cuda
