#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<false, 4>(bool) {
  return gemv_any<false, 4, false>;
}

}  // namespace halfturn::cuda
