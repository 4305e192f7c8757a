"""The operators for layers of others, through Hugging Face's `kernels` package.

    from tca_fast.integrations import hub_kernels

    hub_kernels.register()
    kernelize(model, mode=Mode.TRAINING)  # every layer decorated with hub_kernels.LAYER_NAME

`kernelize` puts another `forward` into a layer and leaves the rest of it as it is. What is
registered here is found in this process; nothing is downloaded.

Shapes: T tokens, D model width, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tca_fast import ops
from tca_fast.errors import UserError

try:
    from kernels import Mode, register_kernel_mapping
except ImportError as error:
    raise ImportError(
        f"tca_fast.integrations.hub_kernels needs the package kernels ({error}); "
        "pip install 'kernels>=0.17'"
    ) from error

LAYER_NAME = "TranscoderMLP"
_PARTS = ("gate_proj", "up_proj", "act_fn", "down_proj", "transcoder_enc", "transcoder_dec")


def register(*, expected_density: float | None = None) -> None:
    """Let `kernelize` run layers decorated with `LAYER_NAME` by `ops.adapter`, on CPU and CUDA.

    Such a layer is a gated MLP with an adapter, as the paper's authors publish theirs: submodules
    gate_proj, up_proj, act_fn, down_proj, and linear transcoder_enc [F, D] with a bias and
    transcoder_dec [D, F] with one or none. Its forward takes x [..., D] and returns

        mlp(x) + transcoder_dec(relu(transcoder_enc(x)))

    or, where it has a true `disable_transcoder`, mlp(x). What else it does is left out, so a layer
    that is trained on statistics it keeps of itself is not to be kernelized.

    It serves all of kernelize's modes; gradients reach every parameter and x. The last registration
    counts.

    Args:
        expected_density: see `ops.adapter`. `kernels` allows a layer no state, so the layer cannot
            learn it; without it, a CUDA device that trains computes dense products.
    """
    # kernelize takes what serves training under torch.compile for its other modes too.
    found = {Mode.TRAINING | Mode.TORCH_COMPILE: _Repository(expected_density)}
    register_kernel_mapping({LAYER_NAME: {"cpu": found, "cuda": found}})


def store_by_feature(model: nn.Module) -> None:
    """Lay out the decoders of decorated layers by feature, as the operators read them.

    Shapes and values stay. Without this, every pass copies the decoder, which costs more than a
    decode step of one token. Call it after loading and before an engine flattens the parameters.
    `model.save_pretrained` of transformers saves the decoders as before; safetensors' `save_file`
    takes no tensor that lies so, and needs `.contiguous()` of each.

    Args:
        model: changed in place.

    Raises:
        UserError: a decorated layer has another layout than `register` describes.
    """
    for module in model.modules():
        if getattr(type(module), "kernel_layer_name", None) == LAYER_NAME:
            _check_layout(module)
            decoder: Any = module.transcoder_dec
            decoder.weight.data = decoder.weight.data.t().contiguous().t()


def _check_layout(layer: Any) -> None:
    """Refuse a layer that lacks what the operators read."""
    lacking = [name for name in _PARTS if not hasattr(layer, name)]
    if not lacking and layer.transcoder_enc.bias is None:
        lacking = ["transcoder_enc.bias"]
    if lacking:
        raise UserError(
            f"kernel_layer_name: {LAYER_NAME!r} is the name of layers with {', '.join(_PARTS)} and "
            f"an encoder bias, but {type(layer).__name__} lacks {', '.join(lacking)}; rename its "
            "parts, or leave it undecorated"
        )


@dataclass(frozen=True)
class _Repository:
    """Where `kernels` finds the layer: what it calls a RepositoryProtocol."""

    expected_density: float | None

    def load(self) -> type[nn.Module]:
        """The class whose `forward` is taken."""
        expected_density = self.expected_density

        class TranscoderMLP(nn.Module):
            has_backward = True
            can_torch_compile = True

            def forward(self: Any, x: Tensor) -> Tensor:
                try:
                    mlp_out = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
                    if getattr(self, "disable_transcoder", False):
                        return mlp_out
                    encoder, decoder = self.transcoder_enc, self.transcoder_dec
                    dtype = mlp_out.dtype  # under autocast the lower one
                    return ops.adapter(
                        x.to(dtype),
                        mlp_out,
                        encoder.weight.to(dtype),
                        encoder.bias.to(dtype),
                        decoder.weight.to(dtype).t(),
                        None if decoder.bias is None else decoder.bias.to(dtype),
                        expected_density=expected_density,
                    ).y
                except AttributeError:
                    # Looked for only now: checked beforehand, every decode step would pay for it.
                    _check_layout(self)
                    raise

        return TranscoderMLP
