#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel usual_gemv_kernel<5>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows, 5>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy, 5>;
  return gemv_any<true, 1, From::kRing, 5>;
}

}  // namespace halfturn::cuda
