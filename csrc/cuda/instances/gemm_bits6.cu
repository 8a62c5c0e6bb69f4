#include "../gemm.cuh"

namespace halfturn::cuda {

template void gemm<6>(const Cuda&, const Matrix&, const Operand&, const Output&, int);

}  // namespace halfturn::cuda
