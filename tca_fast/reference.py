"""What every operator means, in plain PyTorch.

Shapes: T tokens, D model width, F features, C capacity (entries reserved for active features).
Arithmetic runs in float32, or in float64 when the inputs are float64; results are rounded once,
to the dtype of `x`. This is the specification that fused backends are tested against, and the
backend that serves every device where nothing faster is registered.

Active features are stored row by row (CSR): token t owns the entries row_ptr[t]..row_ptr[t+1],
each a feature index and its activation, in ascending feature order. A feature is active where
its activation is not zero, so a NaN stays visible. When more features fire than `C`,
`row_ptr[T] > C` says so; the fused pass then recomputes them in its backward, so that nothing is
ever dropped (design §4, performance §5 K1). The fused pass given room for all T·F activations keeps
them densely instead: `value` is then [T·F] and `feature` is empty.
"""

import torch
from torch import Tensor

Packed = tuple[Tensor, Tensor, Tensor]


def features(x_TD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int | None) -> Tensor:
    """Dense activations [T, F] in the dtype of `x`: ReLU, or ReLU of the k largest (paper §3).

    Ties go to the lowest feature index. NaN counts as the largest value, as in `torch.topk`.
    """
    dtype = _compute_dtype(x_TD)
    z_TF = x_TD.to(dtype) @ W_enc_FD.to(dtype).T + b_enc_F.to(dtype)
    if k is not None and k < z_TF.shape[1]:
        order = z_TF.argsort(dim=1, descending=True, stable=True)[:, :k]
        kept = torch.zeros_like(z_TF, dtype=torch.bool).scatter_(1, order, True)
        z_TF = torch.where(kept, z_TF, 0.0)
    return z_TF.relu().to(x_TD.dtype)


def pack(features_TF: Tensor, capacity: int) -> Packed:
    """Dense activations to (row_ptr int64 [T+1], feature int32 [C], value [C]).

    Entries beyond the number of active features are 0; active features beyond `capacity` are
    left out, which `row_ptr[T] > capacity` tells.
    """
    active = features_TF != 0
    row_ptr = torch.zeros(active.shape[0] + 1, dtype=torch.int64, device=active.device)
    torch.cumsum(active.sum(1), 0, out=row_ptr[1:])
    token, index = active.nonzero().unbind(1)
    token, index = token[:capacity], index[:capacity]
    feature = torch.zeros(capacity, dtype=torch.int32, device=active.device)
    value = features_TF.new_zeros(capacity)
    feature[: len(index)] = index.to(torch.int32)
    value[: len(index)] = features_TF[token, index]
    return row_ptr, feature, value


def unpack(row_ptr: Tensor, feature: Tensor, value: Tensor, num_features: int) -> Tensor:
    """The dense activations [T, F] of packed ones; the inverse of `pack` when nothing overflows.

    Raises:
        ValueError: more features fired than fit, so the dense activations cannot be rebuilt.
    """
    token, entries = _entries(row_ptr, feature)
    dense = value.new_zeros(len(row_ptr) - 1, num_features)
    dense[token, feature[:entries].long()] = value[:entries]
    return dense


def keeps_dense(num_activations: int, capacity: int) -> bool:
    """Whether the fused pass keeps all T·F activations rather than the active ones."""
    return capacity >= num_activations


def encode(x_TD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, k: int | None, capacity: int) -> Packed:
    """Active features of every token as (value, row_ptr, feature); `value` has the gradient."""
    row_ptr, feature, value = pack(features(x_TD, W_enc_FD, b_enc_F, k), capacity)
    return value, row_ptr, feature


def encode_backward(
    grad_value_C: Tensor, row_ptr: Tensor, feature: Tensor, x_TD: Tensor, W_enc_FD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx [T,D], dW_enc [F,D], db_enc [F]) of packed activations.

    dx_t = Σ_f da·W_enc[f], dW_enc[f] = Σ_t da·x_t, db_enc[f] = Σ_t da, over active pairs only.
    """
    dtype = _compute_dtype(x_TD)
    dz_TF = unpack(row_ptr, feature, grad_value_C.to(dtype), W_enc_FD.shape[0])
    return _encoder_gradients(dz_TF, x_TD, W_enc_FD)


def decode(
    row_ptr: Tensor,
    feature: Tensor,
    value: Tensor,
    W_dec_FD: Tensor,
    b_dec_D: Tensor | None,
    gain_F: Tensor | None,
) -> Tensor:
    """y_t = b_dec + Σ_f g_f·a_tf·W_dec[f] as [T, D] in the dtype of `value`."""
    dtype = _compute_dtype(value)
    features_TF = unpack(row_ptr, feature, value.to(dtype), W_dec_FD.shape[0])
    return _decode(features_TF, W_dec_FD, b_dec_D, gain_F).to(value.dtype)


def decode_backward(
    grad_y_TD: Tensor,
    row_ptr: Tensor,
    feature: Tensor,
    value: Tensor,
    W_dec_FD: Tensor,
    gain_F: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients (dvalue [C], dW_dec [F,D]) of `decode`.

    da_tf = g_f·⟨dy_t, W_dec[f]⟩ and dW_dec[f] = Σ_t g_f·a_tf·dy_t, over active pairs only.
    """
    dtype = _compute_dtype(value)
    token, entries = _entries(row_ptr, feature)
    index = feature[:entries].long()
    dy_TD = grad_y_TD.to(dtype)
    da_TF = dy_TD @ W_dec_FD.to(dtype).T
    features_TF = unpack(row_ptr, feature, value.to(dtype), W_dec_FD.shape[0])
    if gain_F is not None:
        da_TF = da_TF * gain_F.to(dtype)
        features_TF = features_TF * gain_F.to(dtype)
    dvalue = torch.zeros_like(value)
    dvalue[:entries] = da_TF[token, index].to(value.dtype)
    return dvalue, (features_TF.T @ dy_TD).to(W_dec_FD.dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The whole adapter branch and its statistics in one pass (contract §1.1, §1.4, §1.5).

    Returns:
        y [..., D] = mlp_out + decode(encode(x)), the shape of `mlp_out`, rounded once;
        l1 [], Σ over real tokens of Σ_f a_tf·‖W_dec[f]‖, not multiplied by the gain;
        l0 int32 [T], active features of each real token, 0 for masked ones;
        fired bool [F], features active in some real token;
        row_ptr, feature, value: the packed active features, for the backward.
    """
    dtype = _compute_dtype(x_TD)
    stored_TF = features(x_TD, W_enc_FD, b_enc_F, k)
    features_TF = stored_TF.to(dtype)
    packed = pack(stored_TF, 0 if keeps_dense(stored_TF.numel(), capacity) else capacity)
    if keeps_dense(stored_TF.numel(), capacity):
        packed = packed[0], packed[1], stored_TF.flatten()
    added_TD = _decode(features_TF, W_dec_FD, b_dec_D, gain_F)
    y = mlp_out.to(dtype) + added_TD.view(mlp_out.shape)
    norm_F = W_dec_FD.to(dtype).norm(dim=1)
    active_TF = stored_TF != 0
    l1_T = features_TF @ norm_F
    if token_mask_T is not None:
        l1_T = torch.where(token_mask_T, l1_T, 0.0)
        active_TF = active_TF & token_mask_T.unsqueeze(1)
    return (
        y.to(x_TD.dtype),
        l1_T.sum(),
        active_TF.sum(1, dtype=torch.int32),
        active_TF.any(0),
        *packed,
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dW_enc, db_enc, dW_dec, db_dec) of `adapter` (design §1).

    da_tf = g_f·⟨dy_t, W_dec[f]⟩ + dl1·m_t·‖W_dec[f]‖ on active pairs, and
    dW_dec[f] = Σ_t g·a·dy_t + dl1·(Σ_t m_t·a_tf)·W_dec[f]/‖W_dec[f]‖, the last term 0 where the
    norm is 0 (the sub-gradient PyTorch takes, contract §1.2).
    """
    dtype = _compute_dtype(x_TD)
    if not len(feature) and len(value) == len(x_TD) * len(W_enc_FD):
        stored_TF = value.view(len(x_TD), len(W_enc_FD))
    elif int(row_ptr[-1]) > len(feature):
        stored_TF = features(x_TD, W_enc_FD, b_enc_F, k)
    else:
        stored_TF = unpack(row_ptr, feature, value, W_enc_FD.shape[0])
    features_TF = stored_TF.to(dtype)
    dy_TD, W_dec = grad_y_TD.to(dtype), W_dec_FD.to(dtype)
    da_TF = dy_TD @ W_dec.T
    gained_TF = features_TF
    if gain_F is not None:
        da_TF = da_TF * gain_F.to(dtype)
        gained_TF = features_TF * gain_F.to(dtype)

    norm_F = W_dec.norm(dim=1)
    masked_TF = features_TF
    dl1_T = grad_l1.to(dtype).expand(len(x_TD))
    if token_mask_T is not None:
        dl1_T = torch.where(token_mask_T, dl1_T, 0.0)
        masked_TF = torch.where(token_mask_T.unsqueeze(1), features_TF, 0.0)
    da_TF = da_TF.addr_(dl1_T, norm_F)
    direction_FD = torch.where(norm_F.unsqueeze(1) == 0, 0.0, W_dec / norm_F.unsqueeze(1))
    norm_gradient_F = grad_l1.to(dtype) * masked_TF.sum(0)
    dW_dec = gained_TF.T @ dy_TD + norm_gradient_F.unsqueeze(1) * direction_FD

    dz_TF = da_TF.masked_fill_(stored_TF == 0, 0.0)
    return (
        *_encoder_gradients(dz_TF, x_TD, W_enc_FD),
        dW_dec.to(W_dec_FD.dtype),
        dy_TD.sum(0).to(W_dec_FD.dtype),
    )


def _decode(
    features_TF: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor | None, gain_F: Tensor | None
) -> Tensor:
    dtype = features_TF.dtype
    if gain_F is not None:
        features_TF = features_TF * gain_F.to(dtype)
    y_TD = features_TF @ W_dec_FD.to(dtype)
    return y_TD if b_dec_D is None else y_TD + b_dec_D.to(dtype)


def _encoder_gradients(
    dz_TF: Tensor, x_TD: Tensor, W_enc_FD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = dz_TF.dtype
    return (
        (dz_TF @ W_enc_FD.to(dtype)).to(x_TD.dtype),
        (dz_TF.T @ x_TD.to(dtype)).to(W_enc_FD.dtype),
        dz_TF.sum(0).to(W_enc_FD.dtype),
    )


def _entries(row_ptr: Tensor, feature: Tensor) -> tuple[Tensor, int]:
    """The token of every packed entry, and how many there are."""
    entries = int(row_ptr[-1])
    if entries > len(feature):
        raise ValueError(
            f"row_ptr: {entries} active features do not fit the capacity of {len(feature)}; "
            "encode again with a larger capacity"
        )
    if int(row_ptr[0]) != 0 or bool((row_ptr.diff() < 0).any()):
        raise ValueError("row_ptr: must start at 0 and never fall; pack the features again")
    if bool((feature[:entries] < 0).any()):
        raise ValueError(f"feature: {int(feature[:entries].min())} is negative; pack again")
    tokens = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    return tokens.repeat_interleave(row_ptr.diff()), entries


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
