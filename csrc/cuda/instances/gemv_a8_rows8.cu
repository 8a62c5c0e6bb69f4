#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<true, 1>(bool own) {
  return own ? gemv_any<true, 1, true> : gemv_any<true, 1, false>;
}

}  // namespace halfturn::cuda
