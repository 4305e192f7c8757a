"""What an operator has to do, counted from shapes and sparsity (performance §3).

Shapes: T tokens, D model width, F features, K active features per token. Nothing here is measured.
Every tensor is counted once for each time that it has to cross the memory bus: arguments read,
results written, weight rows read only for features that fire. Index lists count too; L0, fired
features and biases are too small to matter and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import Case

_INDEX_BYTES = 4  # int32 feature of an active pair
_ROW_POINTER_BYTES = 8


@dataclass(frozen=True)
class Work:
    """Arithmetic and traffic of one call.

    Attributes:
        product_flops: of dense products by the vendor library, 2 for each multiplication.
        pair_flops: of the active pairs, likewise.
        product_bytes: arguments and results of the products; hidden under their arithmetic.
        streamed_bytes: what has to be read or written beside the products.
        gathered_bytes: weight and token rows fetched for single active pairs, mostly from cache;
            each is also in `streamed_bytes`, once for all pairs that use it.
        selection_bytes: pre-activations read again to find the active ones, which a selection
            fused into the product would not do.
    """

    product_flops: float
    pair_flops: float
    product_bytes: float
    streamed_bytes: float
    gathered_bytes: float = 0
    selection_bytes: float = 0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(
            self.product_flops + other.product_flops,
            self.pair_flops + other.pair_flops,
            self.product_bytes + other.product_bytes,
            self.streamed_bytes + other.streamed_bytes,
            self.gathered_bytes + other.gathered_bytes,
            self.selection_bytes + other.selection_bytes,
        )

    @property
    def flops(self) -> float:
        """All arithmetic."""
        return self.product_flops + self.pair_flops

    @property
    def bytes(self) -> float:
        """Least traffic of the call: each tensor once."""
        return self.product_bytes + self.streamed_bytes


def encoder_product(case: Case, itemsize: int) -> Work:
    """x·W_encᵀ alone: the floor that every figure is compared with.

    2TDF operations; reads x and W_enc. Its result is the layer's to keep or to drop, so it counts
    as `selection_bytes` of those who read it.
    """
    T, D, F = case.tokens, case.width, case.features
    return Work(2.0 * T * D * F, 0, (T * D + F * D) * itemsize, 0)


def encode(case: Case, itemsize: int) -> Work:
    """The encoder product, and the active features written as packed rows."""
    pre_activations = case.tokens * case.features * itemsize
    packed = Work(0, 0, 0, _packed(case, itemsize), selection_bytes=pre_activations)
    return encoder_product(case, itemsize) + packed


def decode(case: Case, itemsize: int) -> Work:
    """Packed features and W_dec rows read, y written; one gathered row for each active pair."""
    row = case.width * itemsize
    streamed = _packed(case, itemsize) + (_rows(case) + case.tokens) * row
    return Work(0, _pair_flops(case), 0, streamed, gathered_bytes=_pairs(case) * row)


def forward(case: Case, itemsize: int) -> Work:
    """Encode and decode in one pass: packed features only written, mlp_out read as well."""
    row = case.width * itemsize
    mlp_out = Work(0, 0, 0, case.tokens * row - _packed(case, itemsize))
    return encode(case, itemsize) + decode(case, itemsize) + mlp_out


def backward(case: Case, itemsize: int) -> Work:
    """Gradients of x, both weights and biases, each freshly written.

    Reads packed features, g, x and the rows of both weights; writes dx and both weight gradients
    in full. By feature, a pair fetches g (for its activation's gradient and dW_dec) and x (for
    dW_enc); by token, W_enc (for dx): three gathered rows. performance §3b adds dx into the MLP's
    gradient and therefore reads T·D more.
    """
    T, F, row = case.tokens, case.features, case.width * itemsize
    streamed = _packed(case, itemsize) + (3 * T + 2 * _rows(case) + 2 * F) * row
    return Work(0, 4 * _pair_flops(case), 0, streamed, gathered_bytes=3 * _pairs(case) * row)


def layer(case: Case, itemsize: int) -> Work:
    """Forward and backward."""
    return forward(case, itemsize) + backward(case, itemsize)


def dense_decode(case: Case, itemsize: int) -> Work:
    """The dense way: packed features written out as [T, F], and one product."""
    T, D, F = case.tokens, case.width, case.features
    product = Work(2.0 * T * D * F, 0, (T * F + F * D + T * D) * itemsize, 0)
    return product + Work(0, 0, 0, _packed(case, itemsize) + T * F * itemsize)


def dense_forward(case: Case, itemsize: int) -> Work:
    """The dense way with everything fused that can be: two products, ReLU and statistics in one.

    One pass reads pre-activations and writes activations; mlp_out is added by the second product.
    """
    T, D, F = case.tokens, case.width, case.features
    one = encoder_product(case, itemsize)
    second = Work(one.flops, 0, (2 * T * D + F * D) * itemsize, 0)
    return one + second + Work(0, 0, 0, 2.0 * T * F * itemsize)


def dense_backward(case: Case, itemsize: int) -> Work:
    """The dense way: four products, one pass that masks gradients, one for the decoder norms.

    The first pass reads activations and their gradients and writes the latter; the norm gradient
    reads W_dec and adds to dW_dec; db_dec reads g.
    """
    T, D, F = case.tokens, case.width, case.features
    products = Work(8.0 * T * D * F, 0, 4.0 * (T * D + F * D) * itemsize, 0)
    return products + Work(0, 0, 0, (3.0 * T * F + 3 * F * D + T * D) * itemsize)


def _pairs(case: Case) -> float:
    return case.tokens * case.active


def _pair_flops(case: Case) -> float:
    """One row times one number, added, for every active pair."""
    return 2.0 * _pairs(case) * case.width


def _packed(case: Case, itemsize: int) -> float:
    return _pairs(case) * (itemsize + _INDEX_BYTES) + (case.tokens + 1) * _ROW_POINTER_BYTES


def _rows(case: Case) -> float:
    """Most weight rows that active pairs can name."""
    return min(case.features, _pairs(case))
