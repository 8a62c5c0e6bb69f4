#include "../gemv.cuh"

namespace halfturn::cuda {

template <>
GemvKernel gemv_kernel<false, 1>(From from) {
  if (from == From::kRows) return gemv_any<false, 1, From::kRows>;
  return gemv_any<false, 1, From::kRing>;
}

}  // namespace halfturn::cuda
