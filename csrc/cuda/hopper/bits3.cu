#include "gemm_hopper.cuh"

namespace halfturn::cuda {

template void gemm_hopper<3>(const Cuda&, const GemmParts&, const Operand&, int);

}  // namespace halfturn::cuda
