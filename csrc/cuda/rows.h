// What happens to rows between products: the embedding, norms, the activation, and making operands of them.
#pragma once
#include "cuda.h"
#include "kv.h"
#include "operand.h"
#include "sample.h"

namespace halfturn::cuda {

constexpr int64_t kWidestRow = 32768;  // inputs of a matrix that has operands
constexpr int64_t kSmallRow = 8192;    // up to here rows are taken in chunks of 256 values, above of 1024

// x [rows, stride] <- the embedding of each row's token; token -1 - i is the one in drawn[i].
void embed(const Cuda& device, const Matrix& matrix, const RowsView& view, int rows, float* x, int64_t stride,
           const SampleResult* drawn);
// out <- RMSNorm(x) * weight (ones where empty) - mean (of int8 alone, zeros where empty); of the rows
// chosen[0..out.rows) of x where `chosen` (device memory) is given.
void norm(const Cuda& device, const float* x, int64_t stride, int size, const Vector& weight, const Vector& mean,
          double epsilon, const int32_t* chosen, const Operand& out);
// out <- x.
void convert(const Cuda& device, const float* x, int64_t stride, int size, const Operand& out);
// out <- block Hadamard transform of silu(gate) * up.
void activate(const Cuda& device, const float* gate, const float* up, int64_t stride, int size, int block,
              const Operand& out);
// The same in the place of gate, and the largest magnitudes of parts of each row: maxima [rows, returned number], which
// is at most kMostMaxima.
constexpr int kMostMaxima = 256;
int activate(const Cuda& device, float* gate, const float* up, int64_t stride, int size, int block, int rows,
             float* maxima);

// table [context, 2, half] <- cosines and sines of every position; frequencies [half], on the host: radians per
// position. Waits until it is done.
void rope_table(const Cuda& device, const double* frequencies, int half, int64_t context, float* table);
// Zeros, at once.
void clear(void* memory, int64_t bytes);

}  // namespace halfturn::cuda
