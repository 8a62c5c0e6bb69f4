#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<false, 4>(From) {
  return gemv_any<false, 4, From::kRing>;
}

}  // namespace halfturn::cuda
