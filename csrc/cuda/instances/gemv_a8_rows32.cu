#include "../gemv.cuh"

namespace halfturn::cuda {

template GemvKernel gemv_kernel<true, 4>(From, bool, bool);

}  // namespace halfturn::cuda
