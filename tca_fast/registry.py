"""The operators as PyTorch knows them: schema and backend, once per operator.

The dispatcher is the backend table (design §4.1): `reference` serves every device, and a faster
backend takes a device over by registering for its dispatch key, as the compiled extension does for
the CPU. CUDA devices may have several, and `selection` says which one computes a call, from what
was measured. `torch.ops.tca_fast.*` are what is chosen; `torch.ops.tca_fast_reference.*`,
`torch.ops.tca_fast_triton.*` and `torch.ops.tca_fast_cuda.*` are the same operators without a
choice. All take a capacity for the packed active features, which `tca_fast.ops` works out. Shape
rules and gradients are in `operator_rules`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from tca_fast import reference, selection
from tca_fast.errors import UserError
from tca_fast.operator_rules import FAKES, GRADIENTS
from tca_fast.selection import Call

# Implementations beside the reference: the device they serve, the module that holds them, and what
# installs it.
_BACKENDS = {
    "cpp": ("CPU", "tca_fast._C", "pip install --no-build-isolation tca_fast compiles it"),
    "triton": ("CUDA", "triton", "pip install triton"),
    "cuda": (
        "CUDA",
        "tca_fast._cuda",
        "TCA_FAST_CUDA=1 pip install --no-build-isolation tca_fast compiles it where nvcc is",
    ),
}
# `cpp` is what the dispatcher takes for the CPU; it has no namespace of its own.
_NAMESPACES = {
    "cpp": "tca_fast",
    "reference": "tca_fast_reference",
    "triton": "tca_fast_triton",
    "cuda": "tca_fast_cuda",
}
_DISPATCHED = "tca_fast"
# Of the compiled CUDA kernels: columns of a row of gradients, in loads of 16 bytes where rows are
# aligned to them, and features among which the k largest are found.
_MOST_WIDTH = 2048
_MOST_TOPK_FEATURES = 1 << 16
# Dispatch keys under which a backend's own namespace may be registered.
_ANY_DEVICE = "CompositeExplicitAutograd"

_SCHEMAS = {
    "encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, int? k, SymInt capacity)"
        " -> (Tensor value, Tensor row_ptr, Tensor feature)"
    ),
    "encode_backward": (
        "(Tensor grad_value, Tensor row_ptr, Tensor feature, Tensor x, Tensor W_enc)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "decode": (
        "(Tensor row_ptr, Tensor feature, Tensor value, Tensor W_dec, Tensor? b_dec, Tensor? gain)"
        " -> Tensor"
    ),
    "decode_backward": (
        "(Tensor grad_y, Tensor row_ptr, Tensor feature, Tensor value, Tensor W_dec, Tensor? gain)"
        " -> (Tensor, Tensor)"
    ),
    "adapter": (
        "(Tensor x, Tensor mlp_out, Tensor W_enc, Tensor b_enc, Tensor W_dec, Tensor? b_dec,"
        " Tensor? gain, Tensor? token_mask, int? k, SymInt capacity)"
        " -> (Tensor y, Tensor l1, Tensor l0, Tensor fired,"
        " Tensor row_ptr, Tensor feature, Tensor value)"
    ),
    "adapter_backward": (
        "(Tensor grad_y, Tensor grad_l1, Tensor x, Tensor W_enc, Tensor b_enc, Tensor W_dec,"
        " Tensor? gain, Tensor? token_mask, int? k,"
        " Tensor row_ptr, Tensor feature, Tensor value)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


def backends() -> dict[str, dict[str, str]]:
    """Which implementation serves each operator on each kind of device.

    Returns:
        {operator: {"CPU" or "CUDA": backend name}}; "reference" is the plain PyTorch one. For CUDA
        several names, joined by ", ", where the choice depends on the shape.
    """
    return {
        operator: {device: name for device, (name, _) in served.items()}
        for operator, served in serving().items()
    }


def serving() -> dict[str, dict[str, tuple[str, str]]]:
    """As `backends`, each with the reason."""
    family = selection.family()
    table = {}
    for operator in _SCHEMAS:
        by_device = {}
        if _is_registered(operator, "CPU"):
            by_device["CPU"] = "cpp", "the compiled extension is registered for CPU, so it serves"
        else:
            why = "the compiled extension is not installed, so plain PyTorch serves"
            by_device["CPU"] = "reference", why
        by_device["CUDA"] = selection.reason(_forward(operator), cuda_backends(), family)
        table[operator] = by_device
    return table


@lru_cache  # dozens of questions to the dispatcher, for every layer of every decode step
def cuda_backends() -> tuple[str, ...]:
    """Names of the implementations that are installed and can serve CUDA devices."""
    others = [name for name, (key, _, _) in _BACKENDS.items() if key == "CUDA"]
    return ("reference", *filter(_is_installed, others))


def dense_share(device: torch.device, tokens: int, width: int, features: int) -> float:
    """`selection.dense_share` among the backends that may be chosen here."""
    forced = [name for name, space in _NAMESPACES.items() if space == _namespace != _DISPATCHED]
    among = tuple(forced) or cuda_backends()
    return selection.dense_share(device, tokens, width, features, among)


# For torch.compile, which cannot trace a look into the dispatcher or a file: what
# `torch.compiler.assume_constant_result` does, without the seconds that importing its module takes.
dense_share._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the block's operators with one backend, for tests and benchmarks.

    Args:
        name: "reference"; "cpp", the compiled CPU extension; "cuda", the compiled CUDA kernels,
            which need a CUDA device; or "triton", which needs one or Triton's interpreter
            (TRITON_INTERPRET=1 before the first import).

    Raises:
        UserError: no such backend, or it is not installed, or nothing here can run it.
    """
    global _namespace
    if name not in _NAMESPACES:
        known = ", ".join(sorted(_NAMESPACES))
        raise UserError(f"backend: {name!r} is not known; choose one of {known}")
    if name in _BACKENDS:
        _, module, remedy = _BACKENDS[name]
        if not _is_installed(name):
            raise UserError(f"backend: {name!r} needs {module}, which is not installed; {remedy}")
    if name == "triton" and not torch.cuda.is_available() and not _triton_is_interpreted():
        raise UserError(
            "backend: 'triton' needs a CUDA device and there is none; set TRITON_INTERPRET=1 to "
            "run its kernels in Triton's interpreter"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("backend: 'cuda' needs a CUDA device and there is none; choose another")
    before, _namespace = _namespace, _NAMESPACES[name]
    try:
        yield
    finally:
        _namespace = before


def operator(name: str) -> Callable[..., Any]:
    """An operator of the backend in force, by its name in `backends()`."""
    return _OPERATORS[_namespace][name]


def call(name: str, *arguments: Any) -> Any:
    """Run an operator of the backend in force, by its name in `backends()`."""
    run = _OPERATORS[_namespace][name]
    if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
        return run(*arguments)
    # Gradients of Python operators are recorded in Python, by a kernel that runs also where there
    # is nothing to record, and costs several percent of a decode step there.
    with torch._C._AutoDispatchBelowAutograd():
        return run(*arguments)


def _is_registered(operator: str, key: str, namespace: str = _DISPATCHED) -> bool:
    name = f"{namespace}::{operator}"
    return torch._C._dispatch_has_kernel(name) and (
        torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    )


def _is_installed(name: str) -> bool:
    """Whether every operator of a backend is there."""
    namespace = _NAMESPACES[name]
    keys = [_BACKENDS[name][0]] if namespace == _DISPATCHED else [_BACKENDS[name][0], _ANY_DEVICE]
    return all(
        any(_is_registered(operator, key, namespace) for key in keys) for operator in _SCHEMAS
    )


def _triton_is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _register(namespace: str, implementation: Callable[[str], Callable[..., Any]]) -> None:
    _define(namespace)
    for name in _SCHEMAS:
        torch.library.impl(f"{namespace}::{name}", _ANY_DEVICE, implementation(name))


def _define(namespace: str) -> None:
    """The operators without an implementation."""
    _OPERATORS[namespace] = {}
    for name, schema in _SCHEMAS.items():
        operator = f"{namespace}::{name}"
        torch.library.define(operator, schema)
        torch.library.register_fake(operator, FAKES[name])
        if name in GRADIENTS:
            backward, save = GRADIENTS[name]
            gradient = partial(backward, getattr(torch.ops, namespace))
            torch.library.register_autograd(operator, gradient, setup_context=save)
        _OPERATORS[namespace][name] = getattr(getattr(torch.ops, namespace), name).default


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the dtype of products inside an operator, which autocast would lower."""

    def run(*arguments: Any) -> Any:
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return operator(*arguments)
        with torch.autocast(device, enabled=False):
            return operator(*arguments)

    return run


def _reference(name: str) -> Callable[..., Any]:
    return _without_autocast(getattr(reference, name))


def _triton(name: str) -> Callable[..., Any]:
    """An operator in Triton, whose import waits for the first call; kernels know no strides."""

    def run(*arguments: Any) -> Any:
        from tca_fast.kernels import operators

        dense = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
        options = {}
        if _forward(name) == "adapter":
            _, *shape, _ = _call(name, _given(name, arguments))
            options["dense_share"] = dense_share(dense[0].device, *shape)
        # Triton launches on the current device, which need not be the one of the tensors.
        with torch.cuda.device_of(dense[0]):
            return getattr(operators, name)(*dense, **options)

    return _without_autocast(run)


def _measured(name: str) -> Callable[..., Any]:
    """An operator on CUDA, by the backend that was measured to be the fastest for the call."""

    def run(*arguments: Any) -> Any:
        given, among = _given(name, arguments), cuda_backends()
        asked = _call(name, given)
        # What is asked for by name says itself what it does not serve.
        if not selection.named(among) and not _fits_compiled(asked, given):
            among = tuple(backend for backend in among if backend != "cuda")
        chosen = selection.choose(asked, among, arguments[0].device)
        return _OPERATORS[_NAMESPACES[chosen]][name](*arguments)

    return run


def _forward(operator: str) -> str:
    return operator.removesuffix("_backward")


def _given(name: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of an operator by name."""
    parameters = _OPERATORS[_DISPATCHED][name]._schema.arguments  # type: ignore[attr-defined]
    return {parameter.name: a for parameter, a in zip(parameters, arguments, strict=True)}


def _room(given: dict[str, Any]) -> int:
    """Activations that there is room for: what a forward reserves, and its backward is handed."""
    if "capacity" in given:
        return given["capacity"]
    return len(given["value" if "value" in given else "feature"])


def _fits_compiled(asked: Call, given: dict[str, Any]) -> bool:
    """Whether the compiled CUDA kernels serve a call and its backward; csrc/cuda has the limits."""
    weight, k = given["W_enc" if "W_enc" in given else "W_dec"], given.get("k")
    numbers_a_load = 16 // weight.itemsize
    is_aligned = asked.width % numbers_a_load == 0
    most_width = _MOST_WIDTH * numbers_a_load if is_aligned else 2 * _MOST_WIDTH
    keeps_dense = asked.operator == "adapter" and _room(given) >= asked.tokens * asked.features
    return (
        weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and asked.width <= most_width
        and (_room(given) < 2**31 or keeps_dense)
        and (k is None or asked.features <= _MOST_TOPK_FEATURES)
    )


def _call(name: str, given: dict[str, Any]) -> Call:
    """What `selection` may look at: the same for a forward pass and its backward."""
    features, width = given["W_enc" if "W_enc" in given else "W_dec"].shape
    tokens = len(given["x"]) if "x" in given else len(given["row_ptr"]) - 1
    density = min(1.0, _room(given) / max(1, tokens * features))
    # Without a k the layer has room for twice what is expected, unless it has room for all.
    if "k" in given and given["k"] is None and _forward(name) == "adapter" and density < 1:
        density /= 2
    return Call(_forward(name), tokens, width, features, density)


# By namespace and name; finding an operator in `torch.ops` is a visible share of a decode step.
_OPERATORS: dict[str, dict[str, Callable[..., Any]]] = {}
_namespace = _DISPATCHED
_register(_DISPATCHED, _reference)
_register(_NAMESPACES["reference"], _reference)
_define(_NAMESPACES["cuda"])
# Absent, others serve; present but broken, the ImportError comes out.
for _name in ("tca_fast._C", "tca_fast._cuda"):
    if importlib.util.find_spec(_name):
        importlib.import_module(_name)
if importlib.util.find_spec("triton"):
    _register(_NAMESPACES["triton"], _triton)
for _name in _SCHEMAS:
    torch.library.impl(f"{_DISPATCHED}::{_name}", "CUDA", _measured(_name))
