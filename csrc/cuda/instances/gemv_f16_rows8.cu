#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<false, 1>(bool own) {
  return own ? gemv_any<false, 1, true> : gemv_any<false, 1, false>;
}

}  // namespace halfturn::cuda
