#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<true, 2>(bool) {
  return gemv_any<true, 2, false>;
}

}  // namespace halfturn::cuda
