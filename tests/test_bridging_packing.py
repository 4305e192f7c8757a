"""Sequences packed into one row against the same sequences padded: nothing may change."""

import contextlib

import plain_flash_attention
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import batch, packed, randomise, tiny_qwen2
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention import flex_attention as torch_flex
from transformers import masking_utils
from transformers.integrations import flex_attention as transformers_flex
from zoo import ZOO, make

from tca_fast import AdapterConfig
from tca_fast.architectures.structure import decoder_parts
from tca_fast.bridging.inputs import Inputs, Packing, check_packing
from tca_fast.bridging.plain import PlainObjective
from tca_fast.bridging.shared import SharedObjective
from tca_fast.bridging.streams import build_streams
from tca_fast.config import ObjectiveConfig
from tca_fast.errors import UserError

STEPS = [PlainObjective, SharedObjective]
TOLERANCE = 1e-5  # in float32, relative; gradients in norm, tensor by tensor
# A KL is a difference of logarithms of size 4 or so, whose last bits it cannot be better than.
VALUE_FLOOR = 8 * torch.finfo(torch.float32).eps
# Of the norm of the whole gradient: its roundings, for tensors that are nearly nothing.
GRADIENT_FLOOR = 1e-6
IS_LONG = settings().max_examples > 200  # the profile of `make test-long`
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def streams():
    """One pair for all mixes of lengths; its windows of 5 are shorter than many sequences."""
    windowed = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    made = build_streams(
        tiny_qwen2(1, **windowed), tiny_qwen2(2, **windowed), AdapterConfig(num_features=19)
    )
    randomise(made.adapted)
    return made


def attend_by(streams, implementation):
    for model in (streams.adapted.model, streams.reference):
        model.set_attn_implementation(implementation)


def evaluate(step, streams, inputs, cutoffs=(0, 1, 3)):
    output = step(streams, ObjectiveConfig(l1_weight=0.1))(**inputs, cutoffs=list(cutoffs))
    parameters = list(streams.adapted.parameters())
    return output, torch.autograd.grad(output.loss, parameters, materialize_grads=True)


def assert_packed_equals_padded(step, streams, padded, cutoffs=(0, 1, 3)):
    """Loss and metrics key by key, fired features, and every gradient; returns the packed ones."""
    found = evaluate(step, streams, packed(padded), cutoffs)
    assert_equal(found, evaluate(step, streams, padded, cutoffs))
    return found


def assert_equal(found, expected):
    (row, of_row), (output, gradients) = found, expected
    torch.testing.assert_close(row.loss, output.loss, rtol=TOLERANCE, atol=VALUE_FLOOR)
    assert list(row.metrics) == list(output.metrics)
    for name, value in output.metrics.items():
        torch.testing.assert_close(
            row.metrics[name], value, rtol=TOLERANCE, atol=VALUE_FLOOR, msg=name
        )
    assert torch.equal(row.fired, output.fired)
    floor = GRADIENT_FLOOR * torch.stack([gradient.norm() for gradient in gradients]).norm()
    for ours, expected in zip(of_row, gradients, strict=True):
        assert (ours - expected).norm() <= TOLERANCE * expected.norm() + floor
    assert any(gradient.any() for gradient in gradients)


def random_rows(lengths, labelled, seed):
    """Right-padded sequences of which a share `labelled` of the tokens counts, at least one."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    ids = torch.randint(3, 61, shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.rand(shape, generator=generator) >= labelled] = -100
    longest = lengths.index(max(lengths))
    labels[longest, 1] = ids[longest, 1]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


MIXES = st.tuples(
    st.lists(st.integers(1, 20), min_size=1, max_size=6).filter(lambda mix: max(mix) > 1),
    st.sampled_from([0.3, 1.0]),
    st.integers(0, 2**16),
)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@settings(max_examples=200 if IS_LONG else 12)
@given(MIXES)
def test_any_mix_of_lengths_gives_the_same(streams, implementation, mix):
    attend_by(streams, implementation)
    for step in STEPS:
        assert_packed_equals_padded(step, streams, random_rows(*mix))


# transformers compiles flex attention. For CPUs PyTorch (2.13) has only a compiled forward, whose
# C++ does not build for a second length, and refuses tensors that need a gradient. It also has the
# arithmetic in plain operators, which both ways below take; masks and scores are transformers' own.


def own_flex_attention(query, key, value, training=False, **options):
    """PyTorch's, not compiled but traced anew by every call, with its own backward: seconds."""
    return torch_flex.flex_attention(query, key, value, **options)


def dense_flex_attention(query, key, value, *, score_mod, block_mask, scale, **options):
    """The forward of the same by itself, with the backward of autograd."""
    return math_attention(query, key, value, score_mod, block_mask.as_tuple(), scale, {})[0]


@contextlib.contextmanager
def plain_flex_attention(attention):
    compiled_mask = masking_utils.create_block_mask

    def mask(*arguments, _compile=True, **options):
        return compiled_mask(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
        patch.setattr(transformers_flex, "compile_friendly_flex_attention", attention)
        patch.setattr(masking_utils, "create_block_mask", mask)
        yield


@settings(max_examples=200 if IS_LONG else 4)
@given(MIXES)
def test_any_mix_of_lengths_gives_the_same_with_flex_attention(streams, mix):
    attend_by(streams, "flex_attention")
    with plain_flex_attention(dense_flex_attention):
        for step in STEPS:
            assert_packed_equals_padded(step, streams, random_rows(*mix))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_both_ways_of_flex_attention_give_what_sdpa_does(streams):
    mix = random_rows([9, 1, 14], 0.5, 3)
    attend_by(streams, "flex_attention")
    with plain_flex_attention(own_flex_attention):
        own = assert_packed_equals_padded(SharedObjective, streams, mix, cutoffs=[1])
    with plain_flex_attention(dense_flex_attention):
        assert_equal(own, evaluate(SharedObjective, streams, packed(mix), [1]))
    attend_by(streams, "sdpa")
    assert_equal(own, evaluate(SharedObjective, streams, packed(mix), [1]))


@settings(max_examples=200 if IS_LONG else 12)
@given(MIXES)
def test_any_mix_of_lengths_gives_the_same_with_flash_attention(streams, mix):
    padded = random_rows(*mix)
    attend_by(streams, "sdpa")
    expected = [evaluate(step, streams, padded) for step in STEPS]
    with plain_flash_attention.installed():
        for model in (streams.adapted.model, streams.reference):
            model.config._attn_implementation = "flash_attention_2"  # without a look for a GPU
        for step, sdpa in zip(STEPS, expected, strict=True):
            assert_equal(assert_packed_equals_padded(step, streams, padded), sdpa)


# Masks that transformers makes without position ids, and positions counted from the mask alone.
MIXES_SEQUENCES = ["gpt-oss", "BLOOM"]


@pytest.mark.parametrize("family", [family for family in ZOO if family not in MIXES_SEQUENCES])
def test_every_architecture_gives_the_same(family):
    base, target = (make(family, seed) for seed in (1, 2))
    check_packing(target)
    pair = build_streams(base, target, AdapterConfig(num_features=19))
    randomise(pair.adapted)
    for step in STEPS:
        assert_packed_equals_padded(step, pair, batch())


@pytest.mark.parametrize("family", MIXES_SEQUENCES)
def test_models_that_would_mix_sequences_are_refused(family):
    model = make(family, 2)
    name = type(model).__name__
    message = f"{name} with pair.attn_implementation='eager' lets packed sequences see each other"
    with pytest.raises(UserError, match=message):
        check_packing(model)


def test_models_without_position_ids_are_refused():
    model = tiny_qwen2(1)
    decoder_parts(model).decoder.forward = lambda input_ids, attention_mask, use_cache: None
    with pytest.raises(UserError, match="Qwen2ForCausalLM takes no position ids .*cannot be"):
        check_packing(model)


@pytest.mark.parametrize("step", STEPS)
def test_a_sequence_is_not_moved_by_its_neighbours(streams, step):
    """The gradient of one sequence's loss is the same whatever lies beside it."""
    attend_by(streams, "sdpa")
    found = []
    for seed in (5, 6):
        row = packed(random_rows([7, 6, 8], 1.0, 4))
        others = random_rows([7, 6, 8], 1.0, seed)["input_ids"]
        row["input_ids"][0, :7], row["input_ids"][0, 13:] = others[0, :7], others[2]
        # Statistics and NMSE of the middle one only: the neighbours are made padding.
        row["attention_mask"][0, :7] = row["attention_mask"][0, 13:] = 0
        row["labels"][0, :7] = row["labels"][0, 13:] = -100
        found.append(evaluate(step, streams, row))
    (one, gradients), (other, of_other) = found
    assert one.metrics == other.metrics
    assert all(map(torch.equal, gradients, of_other))


def test_positions_and_borders():
    packing = Packing.of([3, 1, 2])
    assert packing.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert packing.boundaries.tolist() == [0, 3, 4, 6] and packing.longest == 3
    assert packing.boundaries.dtype == torch.int32
    labels = torch.tensor([[5, 6, -100, 7, 8, 9]])
    assert packing.without_borders(labels).tolist() == [[-100, 6, -100, -100, -100, 9]]


def test_flash_attention_is_told_the_boundaries():
    """What transformers' flash attention reads; it runs on GPUs only, so not here."""
    model = tiny_qwen2(1)
    inputs = Inputs(torch.ones(1, 6), torch.ones(1, 6).bool(), torch.ones(1, 6), Packing.of([3, 3]))
    assert "cu_seq_lens_q" not in inputs.arguments(model)
    model.config._attn_implementation = "flash_attention_2"
    told = inputs.arguments(model)
    assert told["attention_mask"] is None
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 6]
    assert told["max_length_q"] == told["max_length_k"] == 3
