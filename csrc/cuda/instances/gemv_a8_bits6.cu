#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel usual_gemv_kernel<6>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows, 6>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy, 6>;
  return gemv_any<true, 1, From::kRing, 6>;
}

}  // namespace halfturn::cuda
