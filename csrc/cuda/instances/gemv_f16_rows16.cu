#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<false, 2>(From) {
  return gemv_any<false, 2, From::kRing>;
}

}  // namespace halfturn::cuda
