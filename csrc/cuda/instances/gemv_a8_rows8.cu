#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 1>(From, bool, bool);

}  // namespace halfturn::cuda
