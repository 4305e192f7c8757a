// The CUDA operators as a library whose kernels run in the emulator, on CPU tensors: loaded beside
// tca_fast, they are `torch.ops.tca_fast_cuda` there.

#define TCA_FAST_MODULE _cuda
#define TCA_FAST_NAMESPACE tca_fast_cuda
#define TCA_FAST_DEVICE CPU

#include "operators.cu"

#include "../../csrc/registration.cpp"
#include "entry.h"
