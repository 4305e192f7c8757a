// csrc/cuda/inference.cu as a library whose kernels run in the emulator, on CPU tensors.

#define TCA_FAST_DEVICE CPU

#include "inference.cu"

#include "entry.h"
