"""The operators, put together from the kernels; what each means is in `tca_fast.reference`.

Nothing here waits for the device, and every size is known from the arguments, so a call can be
captured in a CUDA graph. Products with whole weights go to the vendor's library. All tensors are
contiguous.

Shapes: T tokens, D model width, F features, C capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tca_fast.kernels import ASSUMED_DENSE_SHARE, by_feature, dense, launch, pack
from tca_fast.kernels.gather import gather_rows, norms
from tca_fast.kernels.product import overflow_product
from tca_fast.kernels.select import Counts, select


def encode(
    x_TD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Active features of every token as (value [C], row_ptr [T+1], feature [C])."""
    z_TF = torch.addmm(b_enc_F, x_TD, W_enc_FD.T)
    counts = Counts.empty(*z_TF.shape, z_TF.device)
    bits = select(z_TF, None, k, counts)
    packed = pack.fill(z_TF, bits, counts.row_ptr(), capacity)
    return packed.value, packed.row_ptr, packed.feature


def encode_backward(
    grad_value_C: Tensor, row_ptr: Tensor, feature: Tensor, x_TD: Tensor, W_enc_FD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx [T,D], dW_enc [F,D], db_enc [F]) of packed activations.

    NaN where more fired than fit, as in `decode`.
    """
    pairs = pack.by_feature(row_ptr, feature, W_enc_FD.shape[0])
    dW_enc, db_enc = by_feature.encoder_gradients(row_ptr, pairs, grad_value_C, x_TD, poison=True)
    dx, _ = gather_rows(row_ptr, feature, grad_value_C, W_enc_FD, poison=True)
    return dx, dW_enc, db_enc


def decode(
    row_ptr: Tensor,
    feature: Tensor,
    value: Tensor,
    W_dec_FD: Tensor,
    b_dec_D: Tensor | None,
    gain_F: Tensor | None,
) -> Tensor:
    """y_t = b_dec + Σ_f g_f·a_tf·W_dec[f] as [T, D].

    More entries than fit, or a feature outside 0..F-1, gives NaN: the device finds out, and the
    host does not wait for it.
    """
    y_TD, _ = gather_rows(row_ptr, feature, value, W_dec_FD, gain=gain_F, bias=b_dec_D, poison=True)
    return y_TD


def decode_backward(
    grad_y_TD: Tensor,
    row_ptr: Tensor,
    feature: Tensor,
    value: Tensor,
    W_dec_FD: Tensor,
    gain_F: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients (dvalue [C], dW_dec [F,D]) of `decode`."""
    pairs = pack.by_feature(row_ptr, feature, W_dec_FD.shape[0])
    return by_feature.decoder_gradients(row_ptr, pairs, value, grad_y_TD, W_dec_FD, gain_F)


def adapter(
    x_TD: Tensor,
    mlp_out: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    b_dec_D: Tensor | None,
    gain_F: Tensor | None,
    token_mask_T: Tensor | None,
    k: int | None,
    capacity: int,
    *,
    dense_share: float = ASSUMED_DENSE_SHARE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The adapter branch and its statistics: (y, l1, l0, fired, row_ptr, feature, value).

    `mlp_out` and y are [..., D]. A TopK that keeps more than `dense_share` of all pairs is computed
    by dense products.
    """
    z_TF = torch.addmm(b_enc_F, x_TD, W_enc_FD.T)
    num_tokens, num_features = z_TF.shape
    mlp_out_TD = mlp_out.view(x_TD.shape)
    mask = _as_bytes(token_mask_T)
    counts = Counts.empty(num_tokens, num_features, z_TF.device)
    keeps_dense = capacity >= z_TF.numel()

    if k is None and keeps_dense:
        y_TD, l1_T = _dense_forward(z_TF, None, mlp_out_TD, W_dec_FD, b_dec_D, gain_F, mask, counts)
        packed = _kept_dense(counts.row_ptr(), z_TF)
        y = y_TD.view(mlp_out.shape)
        return y, l1_T.sum(), counts.l0, counts.fired.view(torch.bool), *packed

    bits = select(z_TF, mask, k, counts)
    row_ptr = counts.row_ptr()
    if _by_products(k, capacity, num_tokens, num_features, dense_share):
        y_TD, l1_T = _dense_forward(z_TF, bits, mlp_out_TD, W_dec_FD, b_dec_D, gain_F, mask, None)
        if keeps_dense:
            packed = _kept_dense(row_ptr, z_TF)
        else:
            packed = pack.fill(z_TF, bits, row_ptr, capacity)
    else:
        packed = pack.fill(z_TF, bits, row_ptr, capacity)
        y_TD, l1_T = gather_rows(
            *packed, W_dec_FD, gain=gain_F, base=mlp_out_TD, bias=b_dec_D,
            norm=norms(W_dec_FD, wanted=counts.fired), token_mask=mask,
        )  # fmt: skip
        assert l1_T is not None
        if not _always_fits(k, capacity, num_tokens, num_features):
            overflow = launch.Overflow(row_ptr, capacity)
            norm = norms(W_dec_FD, overflow=overflow)
            dense.activate(z_TF, bits, norm, mask, None, l1_T, overflow)
            overflow_product(
                z_TF, W_dec_FD, y_TD, overflow, scale_of_k=gain_F, base=mlp_out_TD, bias=b_dec_D
            )
    y = y_TD.view(mlp_out.shape)
    return y, l1_T.sum(), counts.l0, counts.fired.view(torch.bool), *packed


def adapter_backward(
    grad_y_TD: Tensor,
    grad_l1: Tensor,
    x_TD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    gain_F: Tensor | None,
    token_mask_T: Tensor | None,
    k: int | None,
    row_ptr: Tensor,
    feature: Tensor,
    value: Tensor,
    *,
    dense_share: float = ASSUMED_DENSE_SHARE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dW_enc, db_enc, dW_dec, db_dec) of `adapter`, given the same share."""
    upstream = dense.Upstream(grad_y_TD, grad_l1, gain_F, _as_bytes(token_mask_T))
    db_dec = upstream.y.sum(0, dtype=launch.sum_dtype(x_TD.dtype)).to(x_TD.dtype)
    num_tokens, num_features, capacity = x_TD.shape[0], W_enc_FD.shape[0], len(feature)

    if not capacity and value.numel() == num_tokens * num_features:
        features_TF = value.view(num_tokens, num_features)
    elif _by_products(k, capacity, num_tokens, num_features, dense_share):
        features_TF = pack.unpack(pack.Packed(row_ptr, feature, value), num_features)
    else:
        pairs = pack.by_feature(row_ptr, feature, num_features)
        da, dW_enc, db_enc, dW_dec = by_feature.adapter_gradients(
            row_ptr, pairs, value, x_TD, W_dec_FD, upstream
        )
        dx, _ = gather_rows(row_ptr, feature, da, W_enc_FD)
        out = dense.Gradients(dx, dW_enc, db_enc, dW_dec)
        if not _always_fits(k, capacity, num_tokens, num_features):
            overflow = launch.Overflow(row_ptr, capacity)
            features_TF = _features_again(x_TD, W_enc_FD, b_enc_F, k, overflow)

            def product(a: Tensor, b: Tensor, result: Tensor, scale: Tensor | None) -> None:
                overflow_product(a, b, result, overflow, scale_of_row=scale)

            dense.backward(features_TF, x_TD, W_enc_FD, W_dec_FD, upstream, out, product, overflow)
        return out.x, out.W_enc, out.b_enc, out.W_dec, db_dec

    out = dense.Gradients.empty(x_TD, W_enc_FD)
    dense.backward(features_TF, x_TD, W_enc_FD, W_dec_FD, upstream, out, _product)
    return out.x, out.W_enc, out.b_enc, out.W_dec, db_dec


def _always_fits(k: int | None, capacity: int, num_tokens: int, num_features: int) -> bool:
    most = num_features if k is None else min(k, num_features)
    return capacity >= num_tokens * most


def _by_products(
    k: int | None, capacity: int, num_tokens: int, num_features: int, dense_share: float
) -> bool:
    """Whether the pass is computed by dense products: known from the arguments, never counted."""
    if capacity >= num_tokens * num_features:
        return True
    return k is not None and capacity >= num_tokens * k and k > dense_share * num_features


def _kept_dense(row_ptr: Tensor, features_TF: Tensor) -> pack.Packed:
    empty = torch.empty(0, dtype=torch.int32, device=features_TF.device)
    return pack.Packed(row_ptr, empty, features_TF.flatten())


def _dense_forward(
    z_TF: Tensor,
    bits: Tensor | None,
    mlp_out_TD: Tensor,
    W_dec_FD: Tensor,
    b_dec_D: Tensor | None,
    gain_F: Tensor | None,
    mask_T: Tensor | None,
    counts: Counts | None,
) -> tuple[Tensor, Tensor]:
    """(y [T, D], l1 [T]) by one dense product; `z` becomes the activations."""
    norm = norms(W_dec_FD)
    l1_T = torch.empty(len(z_TF), dtype=norm.dtype, device=z_TF.device)
    dense.activate(z_TF, bits, norm, mask_T, counts, l1_T)
    dtype = dense.gained_dtype(z_TF, gain_F)
    scaled, W_dec = z_TF.to(dtype), W_dec_FD.to(dtype)
    if gain_F is not None:
        scaled = scaled * gain_F
    if b_dec_D is None:
        y_TD = torch.addmm(mlp_out_TD.to(dtype), scaled, W_dec)
    else:
        # The largest term comes last: its sum with the bias alone would be rounded too.
        y_TD = torch.addmm(b_dec_D.to(dtype), scaled, W_dec).add_(mlp_out_TD)
    return y_TD.to(z_TF.dtype), l1_T


def _product(a: Tensor, b: Tensor, out: Tensor, scale: Tensor | None) -> None:
    """out = scale[:, None]·(a @ b) by the vendor's library, in one dtype that holds the factors."""
    dtype = torch.promote_types(dense.gained_dtype(a, scale), out.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if scale is not None:
        a = a * scale.unsqueeze(1)
    if out.dtype == dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _features_again(
    x_TD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int | None, overflow: launch.Overflow
) -> Tensor:
    """The activations of a forward pass that overflowed, computed once more."""
    z_TF = x_TD.new_empty(x_TD.shape[0], W_enc_FD.shape[0])
    overflow_product(x_TD, W_enc_FD.T, z_TF, overflow, bias=b_enc_F)
    bits = None
    if k is not None:
        bits = select(z_TF, None, k, Counts.empty(*z_TF.shape, z_TF.device), overflow)
    dense.activate(z_TF, bits, None, None, None, None, overflow)
    return z_TF


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
