#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel usual_gemv_kernel<8>(From from) {
  if (from == From::kRows) return gemv_any<true, 1, From::kRows, 8>;
  if (from == From::kCopy) return gemv_any<true, 1, From::kCopy, 8>;
  return gemv_any<true, 1, From::kRing, 8>;
}

}  // namespace halfturn::cuda
