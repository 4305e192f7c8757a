"""Partial runs of any causal language model: on from a residual state, and the head alone.

What a decoder layer is given beside the residual stream (masks, rotary tables, positions) depends
on the batch and not on the weights, so it is recorded in one pass and given again in every partial
one (design §4.10); nothing is rebuilt per architecture.

Shapes: T tokens, B sequences, S positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tca_fast import sparsity
from tca_fast.architectures.structure import decoder_parts
from tca_fast.bridging.inputs import Inputs
from tca_fast.bridging.streams import copy_container

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class LayerCall(NamedTuple):
    """What one decoder layer is given beside the residual stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Trace(NamedTuple):
    """One whole pass through the decoder layers.

    Attributes:
        states: residual stream h_0..h_L, each [B, S, D].
        calls: of every layer.
    """

    states: list[Tensor]
    calls: list[LayerCall]


class PartialRunner:
    """A causal language model that can be run in parts.

    All modules are those of the model and are called as modules, so hooks of any kind (ZeRO-3
    gathers weights by them) work as in a whole pass; but see `whole_heads`.

    Attributes:
        vocab_size: V.
    """

    def __init__(self, model: PreTrainedModel, *, is_checkpointed: bool = False) -> None:
        """Find the parts of a model; nothing is copied and the model stays as it is.

        Args:
            model: a causal language model in eval mode.
            is_checkpointed: keep nothing of a layer for the backward but its input, and run it
                again there.
        """
        self._model = model
        self._is_checkpointed = is_checkpointed
        self._parts = decoder_parts(model)
        self.vocab_size: int = model.config.vocab_size

    def run(self, inputs: Inputs) -> Trace:
        """Embedding and all decoder layers, by the decoder's own forward and without a KV cache."""
        trace = Trace([], [])
        decoder = copy_container(self._parts.decoder)
        layers = nn.ModuleList(
            _RecordedLayer(layer, trace, self._call) for layer in self._parts.layers
        )
        decoder._modules[self._parts.layers_name.rpartition(".")[2]] = layers
        decoder._modules[self._parts.final_norm_name] = nn.Identity()
        output = decoder(**inputs.arguments(self._model))
        trace.states.append(output.last_hidden_state)
        return trace

    def resume(self, calls: Sequence[LayerCall], state_BSD: Tensor, cutoff: int) -> list[Tensor]:
        """Decoder layers cutoff..L-1, from the residual state before the first of them.

        Args:
            calls: recorded on the same batch, of this model or of one that differs in its weights
                only.
            state_BSD: h_cutoff.
            cutoff: first layer to run, 0..L.

        Returns:
            h_cutoff..h_L, each [B, S, D].
        """
        states = [state_BSD]
        for layer, call in zip(self._parts.layers[cutoff:], calls[cutoff:], strict=True):
            output = self._call(layer, states[-1], call)
            states.append(output if isinstance(output, Tensor) else output[0])
        return states

    def logits(self, states_TD: Tensor) -> Tensor:
        """Final norm and head, with whatever soft-cap or scale the architecture has, [T, V].

        Args:
            states_TD: residual states h_L (before the final norm) of any tokens.

        Weights in parts have to be whole, see `whole_heads`.
        """
        head = self._without_layers()
        return head(inputs_embeds=states_TD.unsqueeze(0), use_cache=False).logits.squeeze(0)

    def shares_embedding(self, other: PartialRunner) -> bool:
        """Whether both models embed tokens by the same tensors."""
        return _same_tensors(self._parts.inputs.values(), other._parts.inputs.values())

    def shares_head(self, other: PartialRunner) -> bool:
        """Whether both models' final norm and head are the same tensors."""
        ours, theirs = self._parts, other._parts
        return _same_tensors([ours.final_norm, ours.head], [theirs.final_norm, theirs.head])

    def head_in_parts(self) -> list[nn.Parameter]:
        """Weights of norm and head of which every rank has a part (ZeRO-3)."""
        weights = [*self._parts.final_norm.parameters(), *self._parts.head.parameters()]
        return [weight for weight in weights if hasattr(weight, "ds_id")]

    def _call(self, layer: nn.Module, state_BSD: Tensor, call: LayerCall) -> Any:
        if not (self._is_checkpointed and torch.is_grad_enabled()):
            return layer(state_BSD, *call.args, **call.kwargs)
        recorder = sparsity.current()

        def run(state_BSD: Tensor) -> Any:
            if sparsity.current() is recorder:
                return layer(state_BSD, *call.args, **call.kwargs)
            # In the backward: the same statistics, which the L1 needs, but added nowhere.
            with sparsity.record(None if recorder is None else recorder.token_mask):
                return layer(state_BSD, *call.args, **call.kwargs)

        return checkpoint(run, state_BSD, use_reentrant=False, preserve_rng_state=False)

    def _without_layers(self) -> Any:
        """The model's own forward around nothing but its final norm and head.

        Made anew for every call, because an engine may change modules in place in between.
        """
        model = container = copy_container(self._model)
        *path, decoder_name = self._parts.layers_name.split(".")[:-1]
        for name in path:
            container._modules[name] = copy_container(container.get_submodule(name))
            container = container.get_submodule(name)
        container._modules[decoder_name] = _NormAsDecoder(self._parts.final_norm)
        return _without_hooks(model) if self.head_in_parts() else model


def whole_heads(runners: Iterable[PartialRunner]) -> AbstractContextManager[Any]:
    """For a block that calls `logits`: norms and heads that are in parts are gathered, once.

    ZeRO-3 gathers weights at every call of a module otherwise, and the head is called for every
    chunk of tokens: as often on every rank only if all have batches of the same lengths.
    """
    weights = {id(weight): weight for runner in runners for weight in runner.head_in_parts()}
    if not weights:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([*weights.values()])


def _without_hooks(module: nn.Module) -> nn.Module:
    """The same weights, called by nothing but the module's own forward."""
    bare = copy_container(module)
    for hooks in _HOOKS:
        setattr(bare, hooks, OrderedDict())
    for name, child in bare._modules.items():
        bare._modules[name] = _without_hooks(child)
    return bare


class _RecordedLayer(nn.Module):
    """A decoder layer that writes down what it is given before `call` runs it."""

    def __init__(
        self, layer: nn.Module, trace: Trace, call: Callable[[nn.Module, Tensor, LayerCall], Any]
    ) -> None:
        super().__init__()
        self.layer = layer
        self._trace = trace
        self._call = call

    def __getattr__(self, name: str) -> Any:
        """Decoders read settings such as `attention_type` off their layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = LayerCall(args, kwargs)
        self._trace.states.append(hidden_states)
        self._trace.calls.append(call)
        return self._call(self.layer, hidden_states, call)


class _NormAsDecoder(nn.Module):
    """Stands where the decoder was: its input is h_L and its output what the head reads."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        # The decoder output with the most fields: heads read some of them, all None here.
        output = MoeModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))
        output.cross_attentions = None
        return output


def _same_tensors(ours: Iterable[nn.Module], theirs: Iterable[nn.Module]) -> bool:
    def tensors(modules: Iterable[nn.Module]) -> list[int]:
        return [id(t) for module in modules for t in (*module.parameters(), *module.buffers())]

    return tensors(ours) == tensors(theirs)
