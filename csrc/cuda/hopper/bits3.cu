#include "gemm_hopper.cuh"

namespace halfturn::cuda {

template void gemm_hopper<3>(const Cuda&, const Matrix&, const Operand&, const Output&, int);

}  // namespace halfturn::cuda
