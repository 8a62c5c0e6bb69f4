#include "gemm_hopper.cuh"

namespace halfturn::cuda {

template void gemm_hopper<2>(const Cuda&, const GemmParts&, const Operand&, int);

}  // namespace halfturn::cuda
