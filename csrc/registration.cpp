// The only list of compiled operators. Their schemas, shape rules and gradients are in
// tca_fast/registry.py; this file adds implementations for the devices it was compiled for.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"

STABLE_TORCH_LIBRARY_IMPL(tca_fast, CPU, library) {
  library.impl("encode", TORCH_BOX(&tca_fast::encode));
  library.impl("encode_backward", TORCH_BOX(&tca_fast::encode_backward));
  library.impl("decode", TORCH_BOX(&tca_fast::decode));
  library.impl("decode_backward", TORCH_BOX(&tca_fast::decode_backward));
  library.impl("adapter", TORCH_BOX(&tca_fast::adapter));
  library.impl("adapter_backward", TORCH_BOX(&tca_fast::adapter_backward));
}

// Importing the module is what loads the library.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
