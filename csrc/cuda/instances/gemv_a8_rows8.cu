#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<true, 1>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy>;
  return gemv_any<true, 1, From::kRing>;
}

}  // namespace halfturn::cuda
