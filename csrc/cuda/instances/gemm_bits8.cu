#include "../gemm.cuh"

namespace halfturn::cuda {

template void gemm<8>(const Cuda&, const Matrix&, const Operand&, const Output&, int);

}  // namespace halfturn::cuda
