// All kernels, in the namespace of one instruction set. Included once by each kernels_*.cpp.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "simd.h"
// The parts, in an order in which each finds what it calls.
#include "attention.inl"
#include "elementwise.inl"
#include "kv_store.inl"
#include "matmul.inl"

#define HALFTURN_KERNELS                                                                        \
  {                                                                                             \
      HALFTURN_ISA::kOffset,         HALFTURN_ISA::quantize_row,   HALFTURN_ISA::matmul_a8,     \
      HALFTURN_ISA::matmul_f16,      HALFTURN_ISA::rms_norm,       HALFTURN_ISA::swiglu,        \
      HALFTURN_ISA::exponentials,    HALFTURN_ISA::hadamard,       HALFTURN_ISA::round_to_half, \
      HALFTURN_ISA::read_bytes,      HALFTURN_ISA::rope_and_store, HALFTURN_ISA::attention,     \
      HALFTURN_ISA::attention_chunk, HALFTURN_ISA::attention_merge}
