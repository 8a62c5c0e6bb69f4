#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel usual_gemv_kernel<4>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows, 4>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy, 4>;
  return gemv_any<true, 1, From::kRing, 4>;
}

}  // namespace halfturn::cuda
