// csrc/cuda/generation.cuh on the CPU.

#include "generation.cuh"

#include "entry.h"

namespace cuda = tca_fast::cuda;

#define GENERATION(name, T)                                                                   \
  ENTRY const char* name(                                                                     \
      const T* x, const T* W_enc, const T* b_enc, const T* W_dec, const T* base,              \
      const T* b_dec, const T* gain, T* out, T* activation, uint32_t* bits,                   \
      int64_t num_tokens, int64_t F, int64_t D) {                                             \
    return reported([=] {                                                                     \
      cuda::generation_step<T>(                                                               \
          {x, W_enc, b_enc, W_dec, base, b_dec, gain, out, activation, bits,                  \
           static_cast<int>(num_tokens), static_cast<int>(F), static_cast<int>(D)},           \
          nullptr);                                                                           \
    });                                                                                       \
  }
GENERATION(generation_bfloat16, c10::BFloat16)
#ifndef ONLY_BFLOAT16  // compiles in a third of the time
GENERATION(generation_float16, c10::Half)
GENERATION(generation_float32, float)
#endif
