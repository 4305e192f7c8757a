"""The shared step against the plain one: values, gradients, and what it does not run."""

import collections
import contextlib
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import peak_bytes
from tiny import SHAPE, batch, packed, randomise, tiny_llama, tiny_qwen2
from torch import nn
from zoo import make

from tca_fast import AdapterConfig
from tca_fast.architectures.structure import decoder_parts
from tca_fast.bridging import head
from tca_fast.bridging.golden import verify
from tca_fast.bridging.plain import PlainObjective
from tca_fast.bridging.shared import SharedObjective
from tca_fast.bridging.streams import build_streams
from tca_fast.config import ObjectiveConfig
from tca_fast.sparsity import SparsityRecorder

FAMILIES = {"qwen2": tiny_qwen2, "llama": tiny_llama}
# Agreement that issue 4 asks for in float32, relative; gradients in norm, tensor by tensor, with
# the roundings of the whole gradient as floor for tensors that are nearly nothing.
VALUE_TOLERANCE, GRADIENT_TOLERANCE, GRADIENT_FLOOR = 1e-5, 1e-4, 1e-6
# A KL is a difference of logarithms of size 4 or so, whose last bits it cannot be better than.
VALUE_FLOOR = 8 * torch.finfo(torch.float32).eps
LONG = settings().max_examples > 200


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only lose time to threads waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_steps_agree(streams, config, inputs, cutoffs):
    """Metrics, fired features and gradients of both steps; returns the gradients."""
    parameters = list(streams.adapted.parameters())
    found = {}
    for step in (PlainObjective, SharedObjective):
        output = step(streams, config)(**inputs, cutoffs=cutoffs)
        gradients = torch.autograd.grad(output.loss, parameters, materialize_grads=True)
        found[step] = output, gradients
    (plain, expected), (shared, ours) = found.values()
    assert list(shared.metrics) == list(plain.metrics)
    for name, value in plain.metrics.items():
        torch.testing.assert_close(
            shared.metrics[name], value, rtol=VALUE_TOLERANCE, atol=VALUE_FLOOR, msg=name
        )
    assert torch.equal(shared.fired, plain.fired)
    floor = GRADIENT_FLOOR * torch.stack([gradient.norm() for gradient in expected]).norm()
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= GRADIENT_TOLERANCE * b.norm() + floor
    return ours


@st.composite
def cases(draw):
    """Family, backbone, shapes, adapters, weights, batch and cutoffs of one comparison."""
    layers = draw(st.integers(1, 4))
    key_value_heads = draw(st.sampled_from([1, 2]))
    heads = key_value_heads * draw(st.sampled_from([1, 2]))
    shape = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "hidden_size": heads * draw(st.sampled_from([4, 8])),
        "intermediate_size": draw(st.sampled_from([12, 40])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    k = draw(st.sampled_from([None, 3]))
    adapter = AdapterConfig(
        num_features=draw(st.sampled_from([5, 19])),
        activation="relu" if k is None else "topk",
        k=k,
        decoder_bias=draw(st.booleans()),
    )
    weight = st.sampled_from([0.0, 0.3, 2.0])
    objective = ObjectiveConfig(
        lambda_adapt=draw(weight),
        l1_weight=draw(weight),
        lambda_nmse=draw(weight),
        lambda_bridge=draw(st.sampled_from([0.7, 2.0])),
        loss=draw(st.sampled_from(["kl", "lm"])),
    )
    cutoffs = draw(st.sets(st.integers(0, layers), min_size=1))
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    labelled = draw(st.sampled_from([0.3, 1.0]))
    family, backbone = draw(st.sampled_from([*FAMILIES])), draw(st.sampled_from(["target", "base"]))
    pack = draw(st.sampled_from([lambda padded: padded, packed]))
    seed = draw(st.integers(0, 2**16))
    inputs = pack(random_batch(lengths, labelled, seed))
    return family, backbone, shape, adapter, objective, sorted(cutoffs), inputs, seed


def random_batch(lengths, labelled, seed):
    """Right-padded sequences; `labelled` is the share of tokens that count, at least one."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    ids = torch.randint(3, SHAPE["vocab_size"], shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.rand(shape, generator=generator) >= labelled] = -100
    labels[0, 1] = ids[0, 1]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@settings(max_examples=200 if LONG else 25, deadline=None)
@given(cases())
def test_random_pairs_agree(case):
    family, backbone, shape, adapter, objective, cutoffs, inputs, seed = case
    base, target = (FAMILIES[family](seed=seed + i, **shape) for i in range(2))
    streams = build_streams(base, target, adapter, backbone=backbone)
    randomise(streams.adapted, seed)
    assert_steps_agree(streams, objective, inputs, cutoffs)


def test_the_numbers_of_the_reference_are_met():
    checks = verify(Path(__file__).parent / "golden", step="shared")
    assert sum(bool(check.ok) for check in checks) > 300
    assert not [check.name for check in checks if check.ok is False]


def count_passes(streams):
    """Count forward and backward passes of the decoder layers of both streams, by hooks."""
    counts = collections.Counter()

    def count(stream, output):
        counts[f"{stream} forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda _: counts.update([f"{stream} backward"]))

    for stream, model in zip(("adapter", "reference"), models(streams), strict=True):
        for layer in decoder_parts(model).layers:
            layer.register_forward_hook(lambda m, a, output, stream=stream: count(stream, output))
    return counts


def models(streams):
    return streams.adapted.model, streams.reference


NARROW = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}


def test_no_layer_runs_twice():
    """41.03 adapter forward, 41.03 reference forward, 41.03 adapter and 13.03 reference backward
    passes at 28 layers and one uniform cutoff (performance.md §4)."""
    shape = {**NARROW, "num_hidden_layers": 28}
    base, target = (tiny_qwen2(seed=seed, **shape) for seed in (1, 2))
    streams = build_streams(base, target, AdapterConfig(num_features=4))
    randomise(streams.adapted)
    counts = count_passes(streams)
    objective = SharedObjective(streams, ObjectiveConfig())
    for cutoff in range(29):
        objective(**batch(), cutoffs=[cutoff]).loss.backward()
    suffixes = sum(28 - k for k in range(1, 28))
    assert counts == {
        "adapter forward": 29 * 28 + suffixes,
        "reference forward": 29 * 28 + suffixes,
        "adapter backward": 29 * 28 + suffixes,
        "reference backward": suffixes,
    }
    assert (29 * 28 + suffixes) / 29 == pytest.approx(41.03, abs=0.005)
    assert suffixes / 29 == pytest.approx(13.03, abs=0.005)


def test_many_cutoffs_share_the_same_two_passes():
    streams = build_streams(tiny_qwen2(1), tiny_qwen2(2), AdapterConfig(num_features=4))
    counts = count_passes(streams)
    SharedObjective(streams, ObjectiveConfig())(**batch(), cutoffs=[0, 1, 2, 3]).loss.backward()
    assert counts == {
        "adapter forward": 3 + 2 + 1,
        "reference forward": 3 + 2 + 1,
        "adapter backward": 3 + 2 + 1,
        "reference backward": 2 + 1,
    }


def test_end_cutoffs_are_run_where_the_backbone_is_the_base():
    streams = build_streams(
        tiny_qwen2(1), tiny_qwen2(2), AdapterConfig(num_features=4), backbone="base"
    )
    counts = count_passes(streams)
    output = SharedObjective(streams, ObjectiveConfig())(**batch(), cutoffs=[0, 3])
    assert counts["adapter forward"] == 3 + 3 and counts["reference forward"] == 3
    for direction in ("r2a_kl/cutoff_0", "a2r_kl/cutoff_3"):
        assert output.metrics[direction] != output.metrics["kl"]


def test_nothing_is_left_on_the_models():
    """Partial runs work on copies of containers: hooks, children and outputs stay as they were."""
    streams = build_streams(tiny_qwen2(1), tiny_qwen2(2), AdapterConfig(num_features=4))
    before = [list(model.named_modules()) for model in models(streams)]
    logits = streams.reference(batch()["input_ids"]).logits
    SharedObjective(streams, ObjectiveConfig())(**batch(), cutoffs=[1])
    assert [list(model.named_modules()) for model in models(streams)] == before
    assert torch.equal(streams.reference(batch()["input_ids"]).logits, logits)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for model in models(streams)
        for module in model.modules()
    )


@pytest.mark.parametrize("backbone", ["target", "base"])
def test_checkpointing_changes_nothing_but_memory(backbone):
    """Every figure and gradient bit for bit; statistics are counted once."""
    shape = {"num_hidden_layers": 12, "intermediate_size": 200}
    streams = build_streams(
        tiny_qwen2(1, **shape),
        tiny_qwen2(2, **shape),
        AdapterConfig(num_features=19),
        backbone=backbone,
    )
    randomise(streams.adapted)
    parameters = list(streams.adapted.parameters())

    def step(checkpointing):
        config = ObjectiveConfig(gradient_checkpointing=checkpointing, l1_weight=0.1)
        output = SharedObjective(streams, config)(**batch(), cutoffs=[1, 12])
        return output, torch.autograd.grad(output.loss, parameters)

    (kept, expected), (again, gradients) = step(False), step(True)
    assert again.metrics == kept.metrics and torch.equal(again.fired, kept.fired)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert peak_bytes(lambda: step(True)) < peak_bytes(lambda: step(False)) / 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_statistics_keep_no_output_of_an_adapter(checkpointing, monkeypatch):
    """It is added to the residual stream, which is kept; L more states would be for nothing."""
    streams = build_streams(tiny_qwen2(1), tiny_qwen2(2), AdapterConfig(num_features=4))
    outputs, alive = [], []
    add, l1 = SparsityRecorder.add, SparsityRecorder.l1

    def watched(recorder, layer, output, x=None):
        outputs.append(weakref.ref(output.y))
        add(recorder, layer, output, x)

    def after_the_passes(recorder):
        alive.extend(reference for reference in outputs if reference() is not None)
        return l1(recorder)

    monkeypatch.setattr(SparsityRecorder, "add", watched)
    monkeypatch.setattr(SparsityRecorder, "l1", after_the_passes)
    config = ObjectiveConfig(gradient_checkpointing=checkpointing)
    SharedObjective(streams, config)(**batch(), cutoffs=[1])
    assert len(outputs) == SHAPE["num_hidden_layers"] and not alive


@pytest.mark.parametrize("loss", ["kl", "lm"])
def test_the_step_waits_for_the_device_once(monkeypatch, loss):
    """On the meta device there are no values, so whatever reads one on the host raises.

    Hugging Face reads whether the batch is padded when it builds a mask, which is done once.
    """
    waits = []
    monkeypatch.setattr(
        transformers.masking_utils,
        "_ignore_causal_mask_sdpa",
        lambda *args, **options: waits.append("mask"),
    )
    streams = build_streams(tiny_qwen2(1), tiny_qwen2(2), AdapterConfig(num_features=4))
    objective: nn.Module = SharedObjective(streams, ObjectiveConfig(loss=loss)).to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in batch().items()}
    objective(**inputs, cutoffs=[0, 1, 3]).loss.backward()
    assert waits == ["mask"]
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("backbone", ["target", "base"])
@pytest.mark.parametrize("family", ["Qwen2", "Gemma 2", "GPT-NeoX", "GPT-2", "Cohere"])
def test_heads_in_parts_are_gathered_once_and_called_without_hooks(family, backbone, monkeypatch):
    """Under ZeRO-3 every call of a module gathers its weights, and heads are called by chunks."""
    base, target = (make(family, seed) for seed in (1, 2))
    streams = build_streams(base, target, AdapterConfig(num_features=19), backbone=backbone)
    randomise(streams.adapted)
    monkeypatch.setattr(head, "_LEAST_CHUNK_BYTES", 1)

    def evaluate():
        output = SharedObjective(streams, ObjectiveConfig())(**batch(), cutoffs=[1])
        gradients = torch.autograd.grad(output.loss, [*streams.adapted.parameters()])
        return output.loss, *output.metrics.values(), *gradients

    expected = evaluate()
    gathered, called = [], []

    @contextlib.contextmanager
    def gather(weights):
        gathered.append({id(weight) for weight in weights})
        yield
        gathered.append("released")

    zero = types.SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    weights = set()
    for model in (streams.reference, streams.adapted.model):
        parts = decoder_parts(model)
        for module in (parts.final_norm, parts.head):
            module.register_forward_pre_hook(lambda *_: called.append("before"))
            module.register_full_backward_hook(lambda *_: called.append("backward"))
            weights |= {id(weight) for weight in module.parameters()}
            for weight in module.parameters():
                weight.ds_id = 0
    for found, value in zip(evaluate(), expected, strict=True):
        assert torch.equal(found, value)
    assert gathered == [weights, "released"] and not called
