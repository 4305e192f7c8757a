"""What is compiled, and which folder is which package.

The extension is built against LibTorch's stable ABI, so one binary serves every torch >= 2.11 and
Python >= 3.10. It needs the torch that is installed, hence `pip install --no-build-isolation`.

The CUDA half is compiled where nvcc is and torch was built with CUDA. TCA_FAST_CUDA=1 asks for it
anyway (it needs neither a GPU nor such a torch, so it can be built on one machine and carried to
another), TCA_FAST_CUDA=0 leaves it out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

TORCH_2_11 = "0x020b000000000000"
PYTHON_3_10 = "0x030a0000"
# A100 and H100; what is newer compiles the first again when it loads it.
DEVICES = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"]
CUDA_MODULE = "tca_fast._cuda"
CUDA_SOURCES = ["csrc/cuda/inference.cu", "csrc/cuda/operators.cu"]


def extensions() -> list:
    """Everything that is compiled here."""
    return cpu_extension() + cuda_extension()


def cuda_extension() -> list:
    """The CUDA kernels, where they are wanted; compiled by `Build`, with nvcc alone."""
    asked = os.environ.get("TCA_FAST_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"TCA_FAST_CUDA: {asked!r}, expected 1 to compile the CUDA kernels, 0 not to")
    has_nvcc = shutil.which("nvcc") is not None
    if asked == "1" and not has_nvcc:
        sys.exit("TCA_FAST_CUDA=1: there is no nvcc on the PATH; install the CUDA toolkit")
    if asked == "0" or not (asked or torch.version.cuda):
        return []
    if not has_nvcc:
        print("no nvcc: CUDA devices are served by Triton", file=sys.stderr)
        return []
    headers = [str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".cuh")]
    # Not among the sources: torch's build refuses .cu files where torch was built without CUDA.
    depends = [*CUDA_SOURCES, *sorted(headers)]
    return [Extension(CUDA_MODULE, ["csrc/registration.cpp"], depends=depends, py_limited_api=True)]


class Build(BuildExtension):
    """Compiles the CUDA half by one call of nvcc, which knows its own runtime library."""

    def build_extension(self, ext: Extension) -> None:
        """Leave the CPU's half to torch, and the CUDA half alone where it is up to date."""
        if ext.name != CUDA_MODULE:
            super().build_extension(ext)
            return
        library = Path(self.get_ext_fullpath(ext.name))
        inputs = [Path(name) for name in (*ext.sources, *ext.depends, "setup.py")]
        changed = max(path.stat().st_mtime for path in inputs)
        if library.exists() and library.stat().st_mtime > changed and not self.force:
            return
        library.parent.mkdir(parents=True, exist_ok=True)
        python = [*self.compiler.include_dirs, *self.include_dirs]
        command = ["nvcc", "-shared", "-O3", "-std=c++20", "--threads", "2", "--cudart", "static"]
        command += [argument for device in DEVICES for argument in ("-gencode", device)]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "--no-as-needed"]
        command += [f"-DTORCH_TARGET_VERSION={TORCH_2_11}", f"-DPy_LIMITED_API={PYTHON_3_10}"]
        command += ["-DTCA_FAST_MODULE=_cuda", "-DTCA_FAST_NAMESPACE=tca_fast_cuda"]
        command += ["-DTCA_FAST_DEVICE=CUDA", "-Icsrc/cuda"]
        command += [f"-I{path}" for path in python]
        command += [a for path in include_paths() for a in ("-isystem", path)]
        command += [f"-L{path}" for path in library_paths()]
        command += [
            *ext.sources,
            *CUDA_SOURCES,
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            "-o",
            str(library),
        ]
        subprocess.run(command, check=True)


class BuildCuda(Build):
    """Compiles the CUDA half alone, for the check of what it compiles to."""

    def finalize_options(self) -> None:
        """Leave out what is not CUDA."""
        super().finalize_options()
        self.extensions = [ext for ext in self.extensions if ext.name == CUDA_MODULE]


def cpu_extension() -> list:
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
                "csrc/cpu/decode.h",
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
    cmdclass={"build_ext": Build, "build_cuda": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
