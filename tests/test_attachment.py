"""Attaching changes nothing until an adapter says something, and detaching undoes it."""

import numpy
import pytest
import torch
import torch.utils.checkpoint
from tiny import batch, randomise, tiny_llama, tiny_qwen2
from torch import nn

import tca_fast
from tca_fast import sparsity
from tca_fast.architectures import structure
from tca_fast.architectures.structure import decoder_parts
from tca_fast.residual_stream import residual_states

FAMILIES = {"qwen2": tiny_qwen2, "llama": tiny_llama}
CONFIG = tca_fast.AdapterConfig(num_features=19)
TOKENS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(params=FAMILIES, name="model")
def _model(request):
    return FAMILIES[request.param]()


def logits(model):
    inputs = batch()
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def generate(model, **options):
    prompt = torch.tensor([[5, 6, 7, 8]])
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(model, dtype):
    model.to(dtype)
    before, text = logits(model), generate(model)
    adapted = tca_fast.attach(model, CONFIG)
    assert torch.equal(logits(model), before)
    assert torch.equal(generate(adapted), text)


def test_disabled_is_the_base_model_also_in_generate(model):
    before, text = logits(model), generate(model)
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    assert not torch.equal(logits(model), before)
    with adapted.disabled():
        assert torch.equal(logits(model), before)
        assert torch.equal(generate(model), text)
    assert not torch.equal(logits(model), before)


def test_generation_with_cache_equals_generation_without(model):
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    assert torch.equal(generate(model, use_cache=True), generate(model, use_cache=False))


def test_detach_restores_the_model(model):
    next(model.parameters()).requires_grad_(False)
    before, names = logits(model), list(model.state_dict())
    trainable = [p.requires_grad for p in model.parameters()]
    adapted = tca_fast.attach(model, CONFIG)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapter." not in n)
    randomise(adapted)
    tca_fast.detach(model)
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == trainable
    with pytest.raises(tca_fast.UserError, match="no adapters are attached"):
        tca_fast.detach(model)


def test_adapters_and_gains_made_in_inference_mode_serve_outside_of_it(model, tmp_path):
    with torch.inference_mode():
        adapted = tca_fast.attach(model, CONFIG)
        adapted.save_pretrained(tmp_path)
        tca_fast.detach(model)
        adapted = tca_fast.load(model, tmp_path)
        adapted.set_gain(0, 3, 2.0)
    randomise(adapted)
    logits(model).sum().backward()
    assert all(parameter.grad.any() for parameter in adapted.parameters())


def test_adapters_of_layers_that_are_gone_are_not_saved(model, tmp_path):
    adapted = tca_fast.attach(model, CONFIG)
    del model.model.layers[1]
    with pytest.raises(tca_fast.UserError, match="has 2 layers with adapters, not the 3"):
        adapted.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_state_dict_has_the_models_own_names(model):
    names = list(model.state_dict())
    randomise(tca_fast.attach(model, CONFIG))
    tensors = model.state_dict()
    assert set(names) == {name for name in tensors if ".mlp.adapter." not in name}
    assert len(tensors) == len(names) + 3 * 4

    other = type(model)(model.config).eval()
    tca_fast.attach(other, CONFIG)
    other.load_state_dict(tensors)
    assert torch.equal(logits(other), logits(model))


def test_parameters_have_the_documented_shapes(model):
    adapted = tca_fast.attach(model, CONFIG)
    assert len(adapted.layers) == 3
    first = adapted.layers[0]
    assert first.W_enc.shape == (19, 24) and first.W_dec.shape == (19, 24)
    assert first.b_enc.shape == (19,) and first.b_dec.shape == (24,)
    assert first.W_enc.abs().max() <= 24**-0.5 and not first.W_dec.any()
    without = tca_fast.attach(
        tiny_qwen2(), tca_fast.AdapterConfig(num_features=4, decoder_bias=False)
    )
    assert without.layers[0].b_dec is None


def test_the_seed_decides_the_encoder():
    encoders = [
        tca_fast.attach(tiny_qwen2(), CONFIG, seed=seed).layers[0].W_enc for seed in (3, 3, 4)
    ]
    assert torch.equal(encoders[0], encoders[1]) and not torch.equal(encoders[0], encoders[2])


def test_the_defaults_of_torch_do_not_reach_the_encoder():
    expected = tca_fast.attach(tiny_qwen2(), CONFIG, seed=3).layers[1]
    model = tiny_qwen2()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):  # as set_default_device does
            found = tca_fast.attach(model, CONFIG, seed=3).layers[1]
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(expected.parameters(), found.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("k", [None, 5])
def test_the_wrapped_mlp_computes_the_formula(k):
    """MLP(x) + W_dec·act(W_enc·x + b_enc) + b_dec, recomputed from the parameters."""
    model = tiny_qwen2()
    mlp = model.model.layers[1].mlp
    kind = {"activation": "relu"} if k is None else {"activation": "topk", "k": k}
    adapted = tca_fast.attach(model, tca_fast.AdapterConfig(num_features=19, **kind))
    randomise(adapted)
    x, adapter = torch.randn(2, 4, 24), adapted.layers[1]
    z = x @ adapter.W_enc.T + adapter.b_enc
    features = z.relu()
    if k is not None:
        features = torch.where(z >= z.topk(k).values[..., -1:], features, 0.0)
    expected = mlp(x) + features @ adapter.W_dec + adapter.b_dec
    torch.testing.assert_close(model.model.layers[1].mlp(x), expected)


def test_gain_scales_one_feature(model):
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    x, wrapped = torch.randn(1, 6, 24), model.model.layers[2].mlp
    before = wrapped(x)
    dense = wrapped.adapter.encode(x).to_dense()
    adapted.set_gain(2, 7, -2.5)
    expected = before - 3.5 * (dense[:, 7:8] * wrapped.adapter.W_dec[7]).view(1, 6, 24)
    torch.testing.assert_close(wrapped(x), expected)
    adapted.clear_gains()
    assert torch.equal(wrapped(x), before)
    for layer, feature, value in ((3, 0, 1.0), (-1, 0, 1.0), (0, 19, 1.0), (0, 0, float("nan"))):
        with pytest.raises(tca_fast.UserError):
            adapted.set_gain(layer, feature, value)


def test_statistics_leave_padding_out_and_nothing_behind(model):
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    mask = batch()["attention_mask"].bool()
    inputs = {}
    hooks = [
        wrapped.register_forward_pre_hook(lambda m, args: inputs.setdefault(m.layer, args[0]))
        for wrapped in adapted.wrapped
    ]
    with sparsity.record(mask) as recorder:
        logits(model)
    [hook.remove() for hook in hooks]
    for layer, adapter in enumerate(adapted.layers):
        x = inputs[layer][mask]
        features = (x @ adapter.W_enc.T + adapter.b_enc).relu()
        l1 = (features * adapter.W_dec.norm(dim=1)).sum()
        torch.testing.assert_close(recorder.l1()[layer], l1)
        assert recorder.l0()[layer] == (features > 0).sum()
        assert torch.equal(recorder.fired()[layer], (features > 0).any(0))
    assert sparsity.current() is None
    with sparsity.record(mask), pytest.raises(RuntimeError, match="twice"):
        logits(model)
        logits(model)


def test_feature_ages_count_tokens():
    ages = sparsity.FeatureAges(1, 3)
    ages.update(torch.tensor([[True, False, False]]), 10)
    ages.update(torch.tensor([[False, True, False]]), 5)
    assert ages.tokens.tolist() == [[5, 0, 15]]
    assert ages.num_dead(15).tolist() == [1]


def test_residual_states_are_the_stream_before_the_norm(model):
    parts = decoder_parts(model)
    with residual_states(model) as states:
        final = logits(model)
    assert len(states) == len(parts.layers) + 1
    assert torch.equal(states[0], model.get_input_embeddings()(batch()["input_ids"]))
    torch.testing.assert_close(parts.head(parts.final_norm(states[-1])), final)


def test_compiled_adapted_mlp_agrees():
    model = tiny_qwen2()
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    wrapped, x = adapted.wrapped[0], torch.randn(2, 5, 24)
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wrapped(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_agrees(use_reentrant):
    """Also after the expected density has changed between passes."""
    model = tiny_qwen2()
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    wrapped, adapter = adapted.wrapped[0], adapted.layers[0]
    x = torch.randn(2, 5, 24, requires_grad=True)
    inputs = [x, *adapter.parameters()]
    plain = torch.autograd.grad(wrapped(x).square().sum(), inputs)
    adapter.expect_observed_density()
    y = torch.utils.checkpoint.checkpoint(wrapped, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for expected, tensor in zip(plain, inputs, strict=True):
        torch.testing.assert_close(tensor.grad, expected)


def test_attaching_twice_is_refused(model):
    tca_fast.attach(model, CONFIG)
    with pytest.raises(tca_fast.UserError, match="already attached"):
        tca_fast.attach(model, CONFIG)


def test_unsupported_structures_are_named():
    with pytest.raises(tca_fast.UserError, match="num_hidden_layers"):
        tca_fast.attach(nn.Linear(3, 3), CONFIG)
    model = tiny_qwen2()
    del model.model.layers[1].mlp
    with pytest.raises(tca_fast.UserError, match="no child named 'mlp' in model.layers.1"):
        tca_fast.attach(model, CONFIG)
    model = tiny_qwen2()
    model.model.extra = nn.LayerNorm(24)
    with pytest.raises(tca_fast.UserError, match="exactly one normalisation"):
        tca_fast.attach(model, CONFIG)
    with pytest.raises(tca_fast.UserError, match="AdaptedModel is no module; .* adapted.model"):
        tca_fast.detach(tca_fast.attach(tiny_qwen2(), CONFIG))


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"final_norm": "norm"}, "positions beside its layers and final norm"),
        ({"final_norm": "norm", "inputs": ("position",)}, "no 'position' in its decoder"),
        ({"final_norm": "nrom", "inputs": ("positions",)}, "no 'nrom' in its decoder"),
        ({"inputs": "positions"}, "inputs: 'positions' is one name"),
    ],
)
def test_mistakes_in_the_file_of_an_architecture_are_named(monkeypatch, says, message):
    """An input that is left out would stay behind where two models exchange their layers."""
    model = tiny_qwen2()
    model.model.positions = nn.Embedding(9, 24)

    def found(model_type):
        return structure.Architecture(**says)

    monkeypatch.setattr(structure, "_architecture", found)
    with pytest.raises(tca_fast.UserError, match=message):
        tca_fast.attach(model, CONFIG)
    says = {"final_norm": "norm", "inputs": ("positions",)}
    assert tca_fast.attach(model, CONFIG).layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype: 'bfloat16' is no floating-point dtype"),
        ({"dtype": torch.int8}, "dtype: torch.int8 is no floating-point dtype"),
        ({"seed": None}, "seed: None is no integer"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(tca_fast.UserError, match=message):
        tca_fast.attach(tiny_qwen2(), CONFIG, **options)


def test_detached_adapters_do_not_answer(model):
    """They would change nothing, and say nothing."""
    adapted = tca_fast.attach(model, CONFIG)
    tca_fast.detach(model)
    again = tca_fast.attach(model, CONFIG)
    calls = [
        lambda one: one(TOKENS),
        lambda one: one.generate(TOKENS, max_new_tokens=1),
        lambda one: one.set_gain(0, 1, 0.0),
        lambda one: one.gains({(0, 1): 0.0}).__enter__(),
        lambda one: one.disabled().__enter__(),
        lambda one: one.use("default"),
        lambda one: one.add("second", CONFIG),
    ]
    for call in calls:
        with pytest.raises(tca_fast.UserError, match="these adapters were detached"):
            call(adapted)
        call(again)


@pytest.mark.parametrize("layer", ["0", [0], 1.0, True, -1, 99])
def test_layers_that_are_none_are_named(model, layer):
    adapted = tca_fast.attach(model, CONFIG)
    with pytest.raises(tca_fast.UserError, match="layer: .* is none of 0"):
        adapted.set_gain(layer, 0, 0.0)


def test_a_layer_may_be_counted_by_numpy(model):
    adapted = tca_fast.attach(model, CONFIG, seed=numpy.int64(3))
    adapted.set_gain(numpy.int64(1), 2, 0.0)
    assert adapted.layers[1].gain[2] == 0


def test_gains_that_are_none_are_named(model):
    adapted = tca_fast.attach(model, CONFIG)
    with pytest.raises(tca_fast.UserError, match="gains: .* is no dict"), adapted.gains([(0, 1)]):
        pass
    with pytest.raises(tca_fast.UserError, match="too large for torch.float32"):
        adapted.set_gain(0, 0, 1e40)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_featurs": 3}, "did you mean 'num_features'"),
        ({"num_features": 0}, "num_features: 0"),
        ({"activation": "topk"}, "needs k"),
        ({"k": 3}, "k=3 has no meaning"),
        ({"activation": "topk", "k": 9, "num_features": 8}, "k=9 exceeds num_features=8"),
        ({"activation": "gelu"}, "activation: 'gelu'"),
    ],
)
def test_bad_adapter_configs_are_named(values, message):
    with pytest.raises(tca_fast.UserError, match=message):
        tca_fast.AdapterConfig(**values)
