#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel usual_gemv_kernel<7>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows, 7>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy, 7>;
  return gemv_any<true, 1, From::kRing, 7>;
}

}  // namespace halfturn::cuda
