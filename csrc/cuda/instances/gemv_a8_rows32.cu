#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<true, 4>(bool) {
  return gemv_any<true, 4, false>;
}

}  // namespace halfturn::cuda
