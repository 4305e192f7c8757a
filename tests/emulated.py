"""CUDA kernels compiled for the CPU and called from tests; see tests/cuda_emulation.

A library is compiled once for each state of its sources and kept under build/.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import weakref
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
_FOLDERS = [ROOT / "csrc", ROOT / "csrc/cuda", ROOT / "tests/cuda_emulation"]
_TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "c++")
# Undefined behaviour, such as a shift by 32, is an illegal instruction, which the emulator reports.
_FLAGS = [
    "-std=c++20", "-O1", "-g", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE",
    "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=vptr",
    "-ftrivial-auto-var-init=pattern",
]  # fmt: skip
# Every access to memory is a call, which the emulator answers: the thread sanitizer is not linked.
# Takes two to five times as long, so `make sanitize` asks for it everywhere.
WATCHED = ["-fsanitize=thread", "-fno-threadsafe-statics"]
ACCESSES_ARE_WATCHED = os.environ.get("CUDA_EMULATION_ACCESSES") == "1"
_ASKED = WATCHED if ACCESSES_ARE_WATCHED else []


def built(source: str, *flags: str) -> Path:
    """The library of one file of tests/cuda_emulation, compiled if it is new.

    Raises:
        RuntimeError: it does not compile; the compiler's words are in the message.
    """
    headers = [p for folder in _FOLDERS for p in folder.rglob("*.*") if p.suffix[1:] in _SOURCES]
    command = [*COMPILER.split(), *_FLAGS, *_ASKED, *flags, *(f"-I{folder}" for folder in _FOLDERS)]
    command += ["-isystem", str(_TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    digest = hashlib.sha256(f"{command} {source} {torch.__version__}".encode())
    for path in sorted(set(headers)):
        digest.update(str(path).encode() + path.read_bytes())
    library = ROOT / "build/cuda_emulation" / f"{Path(source).stem}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        compiled = f"{unfinished}.o"
        command += ["-c", str(ROOT / "tests/cuda_emulation" / source), "-o", compiled]
        link = [*COMPILER.split(), "-shared", compiled, "-o", str(unfinished)]
        link += [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
        for arguments in command, link:
            run = subprocess.run(arguments, capture_output=True, text=True)
            if run.returncode:
                raise RuntimeError(f"{source} does not compile:\n{run.stderr}")
        Path(compiled).unlink()
        unfinished.rename(library)
    return library


_SOURCES = {"h", "cuh", "cu", "cpp"}


def has_compiler() -> bool:
    """Whether there is a C++ compiler to build with."""
    return shutil.which(COMPILER.split()[0]) is not None


class Library:
    """The entries of a compiled file, called with tensors, integers and None."""

    def __init__(self, source: str, *flags: str) -> None:
        self._library = ctypes.CDLL(str(built(source, *flags)))
        self._library.guarded_allocate.argtypes = [ctypes.c_size_t]
        self._library.guarded_allocate.restype = ctypes.c_void_p
        self._library.guarded_free.argtypes = [ctypes.c_void_p]
        self._library.guarded_damage.restype = ctypes.c_char_p

    def call(self, entry: str, *arguments: Tensor | int | None) -> None:
        """Run an entry.

        Raises:
            RuntimeError: what the emulator found wrong with the kernel.
        """
        function = getattr(self._library, entry)
        function.restype = ctypes.c_char_p
        message = function(*map(_argument, arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    def guarded(self, tensor: Tensor) -> Tensor:
        """The same numbers in memory whose ends cannot be crossed unseen."""
        copy = self.empty(*tensor.shape, dtype=tensor.dtype)
        return copy.copy_(tensor.detach())

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Such memory with every bit set: NaN, or −1."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        address = self._library.guarded_allocate(size)
        memory = (ctypes.c_char * size).from_address(address)
        weakref.finalize(memory, self._library.guarded_free, address)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def damage(self) -> str | None:
        """What was written outside of tensors that are gone by now."""
        message = self._library.guarded_damage()
        return None if message is None else message.decode()


def _argument(value: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_int64(value)


def bit_mask(active: Tensor) -> Tensor:
    """Flags [T, F] as words of 32 features, int32 [T, ⌈F/32⌉]."""
    num_tokens, num_features = active.shape
    padded = torch.zeros(num_tokens, -(-num_features // 32) * 32, dtype=torch.int64)
    padded[:, :num_features] = active
    words = (padded.view(num_tokens, -1, 32) << torch.arange(32)).sum(2)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def faulty(source: str, kernel: str, right: str, wrong: str) -> Library:
    """The library with the first such place of one file of csrc/cuda changed, in bfloat16 alone.

    For tests that show that the tests of a kernel can fail.
    """
    text = (ROOT / "csrc/cuda" / kernel).read_text(encoding="utf-8")
    if right not in text:
        raise RuntimeError(f"{kernel} does not contain {right!r}")
    text = text.replace(right, wrong, 1)
    folder = ROOT / "build/cuda_emulation" / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / kernel).write_text(text, encoding="utf-8")
    return Library(source, f"-I{folder}", "-DONLY_BFLOAT16", "-O0", "-g0")
