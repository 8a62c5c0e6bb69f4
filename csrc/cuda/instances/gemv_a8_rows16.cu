#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<true, 2>(From from) {
  if (from == From::kCopy) return gemv_any<true, 2, From::kCopy>;
  return gemv_any<true, 2, From::kRing>;
}

}  // namespace halfturn::cuda
