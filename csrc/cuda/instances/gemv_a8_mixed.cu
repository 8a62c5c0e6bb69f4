#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel usual_gemv_kernel<kMixed>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows, kMixed>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy, kMixed>;
  return gemv_any<true, 1, From::kRing, kMixed>;
}

}  // namespace halfturn::cuda
