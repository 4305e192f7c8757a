// The only list of compiled operators. Their schemas, shape rules and gradients are in
// tca_fast/registry.py; this file adds implementations, and is compiled once for each library:
//
//   tca_fast._C      what serves CPU tensors
//   tca_fast._cuda   the CUDA kernels, in a namespace of their own (tca_fast/selection.py chooses)

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "operators.h"

#ifndef TCA_FAST_MODULE
#define TCA_FAST_MODULE _C
#define TCA_FAST_NAMESPACE tca_fast
#define TCA_FAST_DEVICE CPU
#endif
// Names that are macros have to be expanded before they are pasted.
#define TCA_FAST_IMPLEMENT(space, device, library) STABLE_TORCH_LIBRARY_IMPL(space, device, library)
#define TCA_FAST_TEXT(name) #name
#define TCA_FAST_NAME(name) TCA_FAST_TEXT(name)
#define TCA_FAST_PASTE(prefix, name) prefix##name
#define TCA_FAST_INITIALIZE(name) TCA_FAST_PASTE(PyInit_, name)

TCA_FAST_IMPLEMENT(TCA_FAST_NAMESPACE, TCA_FAST_DEVICE, library) {
  library.impl("encode", TORCH_BOX(&tca_fast::encode));
  library.impl("encode_backward", TORCH_BOX(&tca_fast::encode_backward));
  library.impl("decode", TORCH_BOX(&tca_fast::decode));
  library.impl("decode_backward", TORCH_BOX(&tca_fast::decode_backward));
  library.impl("adapter", TORCH_BOX(&tca_fast::adapter));
  library.impl("adapter_backward", TORCH_BOX(&tca_fast::adapter_backward));
}

// Importing the module is what loads the library.
PyMODINIT_FUNC TCA_FAST_INITIALIZE(TCA_FAST_MODULE)() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, TCA_FAST_NAME(TCA_FAST_MODULE), nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
