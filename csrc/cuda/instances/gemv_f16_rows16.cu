#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<false, 2>(bool) {
  return gemv_any<false, 2, false>;
}

}  // namespace halfturn::cuda
