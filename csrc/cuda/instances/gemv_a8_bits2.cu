#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel usual_gemv_kernel<2>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows, 2>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy, 2>;
  return gemv_any<true, 1, From::kRing, 2>;
}

}  // namespace halfturn::cuda
