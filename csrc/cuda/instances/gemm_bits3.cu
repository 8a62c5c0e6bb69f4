#include "../gemm.cuh"

namespace halfturn::cuda {

template void gemm_any<3>(const Cuda&, const GemmParts&, const Operand&, int);

}  // namespace halfturn::cuda
