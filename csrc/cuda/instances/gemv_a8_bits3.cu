#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel usual_gemv_kernel<3>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows, 3>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy, 3>;
  return gemv_any<true, 1, From::kRing, 3>;
}

}  // namespace halfturn::cuda
