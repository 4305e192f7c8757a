"""The transcoder adapter, and the frozen MLP with an adapter beside it.

Shapes: T tokens, D model width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from tca_fast import activations, ops, sparsity
from tca_fast.density import DensityObserver
from tca_fast.errors import UserError
from tca_fast.ops import ActiveFeatures, AdapterOutput

if TYPE_CHECKING:
    from tca_fast.config import AdapterConfig


class TranscoderAdapter(nn.Module):
    """A sparse branch: y = mlp_out + W_dec·act(W_enc·x + b_enc) + b_dec (paper §3).

    Parameters are kept in float32 by default and cast to the dtype of the activations when they
    are used (design §4.7). The decoder is stored feature-major, one row per feature.

    Attributes:
        width: D; the parameters do not show it where ZeRO-3 has partitioned them.
        W_enc: encoder, [F, D].
        b_enc: encoder bias, [F].
        W_dec: decoder, [F, D].
        b_dec: decoder bias, [D], or None.
        gain: [F] multipliers of the activations, or [B, F] where the rows of a batch have their
            own, or None while all are 1. Not saved.
        expected_density: share of features that a pass reserves memory for, see `ops.adapter`.
        observer: what recent passes found active.
    """

    gain: Tensor | None
    expected_density: float | None = None

    @torch.inference_mode(False)  # else it could never be trained
    def __init__(
        self,
        width: int,
        config: AdapterConfig,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Initialise as contract §1.2: W_enc uniform in ±1/√D, everything else zero.

        Args:
            width: D.
            config: features, activation, k, decoder bias.
            generator: CPU generator of the encoder weights.
            device, dtype: of the parameters.

        Raises:
            UserError: a width that is none, or something else in the place of the configuration.
        """
        super().__init__()
        if not _is_width(width):
            raise UserError(f"width: {width!r} is no model width; give a number such as 4096")
        # By its field and not its class, which needs pydantic: a machine without it has a stand-in.
        if not hasattr(config, "num_features"):
            raise UserError(
                f"config: {config!r} is no configuration; pass "
                "tca_fast.AdapterConfig(num_features=…)"
            )
        self.config = config
        self.width = width
        self.observer = DensityObserver()
        bound = 1 / math.sqrt(width)
        # In float32 on the CPU, whatever the defaults are, so that equal seeds give equal adapters.
        encoder = torch.empty(config.num_features, width, dtype=torch.float32, device="cpu")
        encoder.uniform_(-bound, bound, generator=generator)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        bias = torch.zeros(config.num_features, **options)
        self.W_enc = nn.Parameter(encoder.to(bias))
        self.b_enc = nn.Parameter(bias)
        self.W_dec = nn.Parameter(torch.zeros(config.num_features, width, **options))
        self.b_dec = nn.Parameter(torch.zeros(width, **options)) if config.decoder_bias else None
        self.register_buffer("gain", None, persistent=False)

    def forward(
        self, x: Tensor, mlp_out: Tensor, token_mask: Tensor | None = None
    ) -> AdapterOutput:
        """Add the branch to the MLP's output.

        Args:
            x: input of the MLP, [..., D]; cast to the dtype of `mlp_out`, which under autocast is
                the lower of the two.
            mlp_out: output of the MLP, [..., D].
            token_mask: bool [...]; False leaves a token out of the statistics.

        Returns:
            Output and statistics, see `ops.AdapterOutput`.

        Raises:
            UserError: shapes that do not fit.
        """
        dtype, gain = mlp_out.dtype, self.gain
        x = _cast(x, dtype)
        if gain is not None and gain.dim() == 2:
            return self._forward_by_row(x, mlp_out, token_mask, _cast(gain, dtype))
        output = ops.adapter(
            x,
            mlp_out,
            _cast(self.W_enc, dtype),
            _cast(self.b_enc, dtype),
            _cast(self.W_dec, dtype),
            _cast(self.b_dec, dtype),
            k=self.config.k,
            gain=_cast(gain, dtype),
            token_mask=token_mask,
            expected_density=self.expected_density,
        )
        if torch.is_grad_enabled():  # what is observed serves the memory kept for a backward
            num_tokens = x.numel() // x.shape[-1]
            self.observer.observe(output.num_active, num_tokens * self.config.num_features)
        return output

    def _forward_by_row(
        self, x: Tensor, mlp_out: Tensor, token_mask: Tensor | None, gain_BF: Tensor
    ) -> AdapterOutput:
        """As `forward`, with gains that differ between the rows of the batch.

        Operators know one gain for all tokens, so the gains go into the activations in between.
        """
        if x.dim() != 3 or len(x) != len(gain_BF):
            raise UserError(
                f"gain: set for batches of {len(gain_BF)} rows, but the hidden states have shape "
                f"{tuple(x.shape)}; give one value for each row (generate makes num_beams or "
                "num_return_sequences rows of each), or clear_gains()"
            )
        active = self.encode(x).trim()
        token, feature = active.tokens(), active.feature.long()
        sum_dtype = torch.promote_types(x.dtype, torch.float32)
        # Not in half precision, which a large gain would leave.
        gained = active.value.to(sum_dtype) * gain_BF[token // x.shape[1], feature]
        scaled = ActiveFeatures(active.row_ptr, active.feature, gained, active.num_features)
        added = ops.decode(scaled, _cast(self.W_dec, sum_dtype), _cast(self.b_dec, sum_dtype))
        counted = torch.ones_like(token, dtype=torch.bool)
        l0 = active.counts()
        if token_mask is not None:
            counted, l0 = token_mask.flatten()[token], l0 * token_mask.flatten()
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, dtype=sum_dtype)
        l1 = (active.value.to(sum_dtype) * norms[feature])[counted].sum()
        fired = torch.zeros_like(self.b_enc, dtype=torch.bool, requires_grad=False)
        fired[feature[counted]] = True
        y = (mlp_out + added.view(mlp_out.shape)).to(x.dtype)
        return AdapterOutput(y, l1, l0.int(), fired, active.row_ptr)

    def expect_observed_density(self) -> None:
        """Reserve memory for what was seen since the last call, or as before if nothing was.

        To be called between steps and not within one: a pass that is run again in the backward
        (activation checkpointing) has to keep what the first one kept.
        """
        observed = self.observer.take()
        if observed is not None:
            self.expected_density = observed

    def encode(self, x: Tensor) -> ActiveFeatures:
        """Active features of `x` [..., D], before any gain."""
        W_enc, b_enc = _cast(self.W_enc, x.dtype), _cast(self.b_enc, x.dtype)
        return ops.encode(x, W_enc, b_enc, k=self.config.k)

    def decode(self, active: ActiveFeatures) -> Tensor:
        """What the branch adds for the given features, [T, D], with the gain applied.

        Raises:
            UserError: gains differ between the rows of a batch, and tokens have no rows here.
        """
        dtype = active.value.dtype
        if self.gain is not None and self.gain.dim() == 2:
            raise UserError("gain: differs between rows, which decode does not know; clear_gains()")
        W_dec, b_dec = _cast(self.W_dec, dtype), _cast(self.b_dec, dtype)
        return ops.decode(active, W_dec, b_dec, gain=_cast(self.gain, dtype))

    @torch.inference_mode(False)  # else no backward could use the gain later
    def set_gain(
        self,
        feature: int | Sequence[int] | Tensor | None,
        value: float | Sequence[float] | Tensor,
    ) -> None:
        """Multiply activations from now on; 1 leaves a feature as it is, 0 ablates it.

        Args:
            feature: one feature, several (a list, an array or a tensor), or None for all of this
                layer.
            value: the multiplier, or, with one feature or None, one for each row of the batches
                to come. A call with other than that number of rows is then refused.

        Raises:
            UserError: no such feature, a gain that is not finite, several for several features,
                or gains for another number of rows than those set before.
        """
        columns = slice(None) if feature is None else self._checked(feature)
        multipliers = _numbers("gain", value, torch.float64).cpu()
        if multipliers.dim() > 1 or not multipliers.numel():
            raise UserError(
                f"gain: has shape {list(multipliers.shape)}; give a number, or one for each row of "
                "the batches to come"
            )
        if multipliers.dim() and isinstance(columns, Tensor) and len(columns) > 1:
            raise UserError(
                f"gain: {len(multipliers)} values for {len(columns)} features could be one for "
                "each feature or one for each row; set one feature at a time"
            )
        for multiplier in multipliers.flatten().tolist():
            if not math.isfinite(multiplier):
                raise UserError(f"gain: {multiplier} is not finite; give a number such as 0 or 2.0")
        gain = torch.ones_like(self.b_enc, requires_grad=False) if self.gain is None else self.gain
        if multipliers.dim() and gain.dim() == 1:
            gain = gain.repeat(len(multipliers), 1)
        elif multipliers.dim() and len(gain) != len(multipliers):
            raise UserError(
                f"gain: {len(multipliers)} values, but gains are set for batches of {len(gain)} "
                "rows; clear_gains() first"
            )
        stored = multipliers.unsqueeze(-1).to(gain)
        if not stored.isfinite().all():
            raise UserError(f"gain: {value!r} is too large for {gain.dtype}; give a smaller one")
        # A copy, so that gains that were saved to be restored stay what they were.
        gain = gain.clone()
        gain[..., columns] = stored
        self.gain = gain

    def _checked(self, feature: int | Sequence[int] | Tensor) -> Tensor:
        """Features of this layer as an index."""
        chosen = _numbers("feature", feature).to(self.b_enc.device).flatten()
        if not chosen.numel():
            return chosen.long()
        if chosen.is_floating_point() or chosen.dtype == torch.bool:
            raise UserError(f"feature: {chosen[0].item()} is no integer; give one, or several")
        outside = chosen[(chosen < 0) | (chosen >= self.config.num_features)]
        if outside.numel():
            raise UserError(
                f"feature: {int(outside[0])} is outside 0..{self.config.num_features - 1}, the "
                "features of this layer"
            )
        return chosen.long()

    def clear_gain(self) -> None:
        """Set every gain back to 1."""
        self.gain = None

    def extra_repr(self) -> str:
        """Shape and activation, for `print(model)`."""
        kept = "relu" if self.config.k is None else f"topk(k={self.config.k})"
        features = self.config.num_features
        return f"width={self.width}, num_features={features}, activation={kept}"


def _is_width(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) > 0


def _numbers(name: str, given: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A number or several, as callers write them, as a tensor."""
    try:
        return torch.as_tensor(given, dtype=dtype)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name}: {given!r} is no number; give one, or several") from None


@overload
def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in a dtype; nothing is called where it has it, which adds up in a decode step."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


class AdaptedMLP(nn.Module):
    """A frozen MLP with an adapter beside it, in the place of the MLP.

    Attributes:
        mlp: the wrapped module, untouched; in a `state_dict` its tensors have their bare names.
        adapter: its adapter.
        layer: index of the decoder layer, for statistics.
        enabled: False makes this the bare MLP.
        is_attached: False once it was taken out of its model.
    """

    def __init__(self, mlp: nn.Module, adapter: TranscoderAdapter, layer: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.adapter = adapter
        self.layer = layer
        self.enabled = True
        self.is_attached = True
        self.register_state_dict_post_hook(_name_as_bare)
        self.register_load_state_dict_pre_hook(_name_as_wrapped)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """MLP plus adapter; reports to the open recorders, if any.

        Args:
            hidden_states: [B, S, D].
            args, kwargs: whatever else the decoder layer gives its MLP, passed on.

        Returns:
            [B, S, D], the dtype of the MLP's output. Of an MLP that returns a tuple (experts with
            their router's scores), the first entry is adapted and the others are passed on.
        """
        mlp_out = self.mlp(hidden_states, *args, **kwargs)
        if not self.enabled:
            return mlp_out
        return add_branches([self.adapter], self.layer, hidden_states, mlp_out)


def _name_as_bare(module: nn.Module, tensors: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Name the MLP's tensors in a `state_dict` as without an adapter, so that what
    `model.save_pretrained` writes is still the model; the adapter's stand beside them."""
    wrapped = f"{prefix}mlp."
    for name in [name for name in tensors if name.startswith(wrapped)]:
        tensors[prefix + name.removeprefix(wrapped)] = tensors.pop(name)


def _name_as_wrapped(
    module: nn.Module, tensors: dict[str, Any], prefix: str, *remaining: Any
) -> None:
    """The inverse, for `load_state_dict`."""
    for name in [name for name in tensors if name.startswith(prefix)]:
        if not name.startswith(f"{prefix}adapter."):
            tensors[f"{prefix}mlp.{name.removeprefix(prefix)}"] = tensors.pop(name)


def add_branches(adapters: Sequence[TranscoderAdapter], layer: int, x: Tensor, mlp_out: Any) -> Any:
    """What an MLP returns with adapters beside it; reports to the open recorders, if any.

    Args:
        adapters: those that are on; their branches add up.
        layer: index of the decoder layer.
        x: the MLP's input, [B, S, D].
        mlp_out: what it returned; of a tuple the first entry is adapted.

    Raises:
        UserError: several are on while a recorder is open, which keeps one set of features.
    """
    if isinstance(mlp_out, tuple):
        return (add_branches(adapters, layer, x, mlp_out[0]), *mlp_out[1:])
    recorder, recording = sparsity.current(), activations.current()
    if len(adapters) > 1 and (recorder is not None or recording is not None):
        raise UserError(
            f"recording: {len(adapters)} adapters are active, and what is recorded are the "
            "features of one; set_adapter(name) to one of them first"
        )
    token_mask = None if recorder is None else recorder.token_mask
    for adapter in adapters:
        output = adapter(x, mlp_out, token_mask)
        if recorder is not None:
            recorder.add(layer, output, x)
        if recording is not None:
            recording.add(layer, adapter.encode(x.to(mlp_out.dtype)), x.shape[:-1])
        mlp_out = output.y
    return mlp_out
