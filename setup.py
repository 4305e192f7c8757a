"""What is compiled, and which folder is which package.

The extension is built against LibTorch's stable ABI, so one binary serves every torch >= 2.11 and
Python >= 3.10. It needs the torch that is installed, hence `pip install --no-build-isolation`.
"""

import os
import shutil
import sys

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_2_11 = "0x020b000000000000"
PYTHON_3_10 = "0x030a0000"


def extensions() -> list:
    """The compiled half for the CPU, where there is a C++ compiler."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        print(
            f"no C++ compiler ({compiler}): the plain PyTorch backend will serve", file=sys.stderr
        )
        return []
    return [
        CppExtension(
            "tca_fast._C",
            ["csrc/registration.cpp", "csrc/cpu/operators.cpp"],
            depends=[
                "csrc/arguments.h",
                "csrc/checks.h",
                "csrc/operators.h",
                "csrc/cpu/activation.h",
                "csrc/cpu/arguments.h",
                "csrc/cpu/dense.h",
                "csrc/cpu/kernels.h",
                "csrc/cpu/packed.h",
                "csrc/cpu/packed_tensors.h",
                "csrc/cpu/rows.h",
            ],
            define_macros=[
                ("TORCH_TARGET_VERSION", TORCH_2_11),
                ("Py_LIMITED_API", PYTHON_3_10),
            ],
            # Only the module's entry point is called from outside, and torch hides its own classes.
            extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ]


setup(
    # Not a folder of the package: `kernels` at the root would shadow Hugging Face's `kernels`.
    packages=[*find_packages(include=["tca_fast", "tca_fast.*"]), "tca_fast.kernels"],
    package_dir={"tca_fast.kernels": "kernels/src"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
