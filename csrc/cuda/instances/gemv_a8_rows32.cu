#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<true, 4>(From) {
  return gemv_any<true, 4, From::kRing>;
}

}  // namespace halfturn::cuda
