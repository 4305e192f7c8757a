"""Every architecture of the zoo with adapters beside its MLPs, from attaching to generating.

The oracle is the model itself: bare, uncompiled, without a cache, or from a pass that keeps what it
computes.
"""

import pytest
import torch
from test_bridging_shared import assert_steps_agree
from tiny import batch, randomise
from zoo import README, ZOO, make, readme_with_table

import tca_fast
from tca_fast.bridging.streams import build_streams
from tca_fast.config import ObjectiveConfig
from tca_fast.ops import ActiveFeatures

CONFIG = tca_fast.AdapterConfig(num_features=19)
NEW_TOKENS = 8
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=ZOO)
def family(request):
    return request.param


def logits(model):
    inputs = batch()
    del inputs["labels"]
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def generate(model, **options):
    prompt = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fresh_disabled_and_detached_adapters_change_no_bit(family, dtype):
    model = make(family, dtype=dtype)
    before, text, names = logits(model), generate(model), list(model.state_dict())
    adapted = tca_fast.attach(model, CONFIG)
    assert torch.equal(logits(model), before)
    randomise(adapted)
    after = logits(model)
    assert after.dtype == dtype and after.isfinite().all() and not torch.equal(after, before)
    with adapted.disabled():
        assert torch.equal(logits(model), before)
        assert torch.equal(generate(adapted), text)
    assert torch.equal(logits(model), after)
    tca_fast.detach(model)
    assert torch.equal(logits(model), before) and list(model.state_dict()) == names


def test_saved_adapters_load_to_the_same_bits(family, tmp_path):
    adapted = tca_fast.attach(make(family), CONFIG)
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(tca_fast.load(make(family), tmp_path)), logits(adapted))


def test_the_model_is_saved_as_it_was_while_adapters_are_on(family, tmp_path):
    model = make(family)
    before = logits(model)
    randomise(tca_fast.attach(model, CONFIG))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), before)


def test_generation_with_a_cache_equals_generation_without(family):
    adapted = tca_fast.attach(make(family), CONFIG)
    randomise(adapted)
    assert torch.equal(generate(adapted, use_cache=True), generate(adapted, use_cache=False))


def test_the_gain_acts_on_every_decode_step(family):
    """Scores of a generation with an ablated feature are those of a decoder row of zeros."""
    adapted = tca_fast.attach(make(family), CONFIG)
    randomise(adapted)
    options = {"output_scores": True, "return_dict_in_generate": True}
    plain = generate(adapted, **options)
    with adapted.gains({(1, feature): 0.0 for feature in range(0, 19, 2)}):
        ablated = generate(adapted, **options)
    with torch.no_grad():
        adapted.layers[1].W_dec[::2] = 0
    expected = generate(adapted, **options)
    assert len(ablated.scores) == NEW_TOKENS
    assert torch.equal(ablated.sequences, expected.sequences)
    for step, scores in enumerate(ablated.scores):
        torch.testing.assert_close(scores, expected.scores[step])
        assert not torch.allclose(scores, plain.scores[step], atol=1e-4)


def test_both_steps_of_training_agree(family):
    streams = build_streams(make(family, 1), make(family, 2), CONFIG)
    randomise(streams.adapted)
    gradients = assert_steps_agree(
        streams, ObjectiveConfig(l1_weight=0.1), batch(), cutoffs=[0, 1, 3]
    )
    assert all(gradient.any() for gradient in gradients)


def test_gradient_checkpointing_gives_the_same_gradients(family):
    def gradients(model):
        inputs = batch()
        model(**inputs, use_cache=False).loss.backward()
        return [parameter.grad for parameter in adapted.parameters()]

    model = make(family)
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(model)
    for parameter in adapted.parameters():
        parameter.grad = None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    runs = []
    hook = adapted.wrapped[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    hook.remove()
    assert len(runs) == 2


def test_compiled_models_agree(family):
    """Whole graphs where the bare model is one."""
    torch._dynamo.reset()
    model = make(family, num_layers=1)
    ids = batch()["input_ids"]
    with torch.no_grad():
        try:
            bare = torch._dynamo.explain(model)(input_ids=ids, use_cache=False)
        except torch._dynamo.exc.TorchRuntimeError as error:
            pytest.skip(f"the bare model does not compile: {str(error)[:200]}")
        adapted = tca_fast.attach(model, CONFIG)
        randomise(adapted)
        torch._dynamo.reset()
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=bare.graph_break_count == 0)
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)


def test_a_device_map_is_kept(family, tmp_path):
    pytest.importorskip("accelerate")
    make(family).save_pretrained(tmp_path)
    model = type(make(family)).from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    other = tca_fast.attach(make(family), CONFIG)
    randomise(other)
    assert torch.equal(logits(model), logits(other))


def test_recorded_features_are_those_of_every_step(family):
    adapted = tca_fast.attach(make(family), CONFIG)
    randomise(adapted)
    inputs = [[] for _ in adapted.wrapped]
    hooks = [
        wrapped.register_forward_pre_hook(lambda m, args: inputs[m.layer].append(args[0]))
        for wrapped in adapted.wrapped
    ]
    text = generate(adapted)
    [hook.remove() for hook in hooks]
    with adapted.record() as recording:
        assert torch.equal(generate(adapted), text)
    assert [step.shape for step in recording.steps] == [(2, 5)] + [(2, 1)] * (NEW_TOKENS - 1)
    for layer, adapter in enumerate(adapted.layers):
        for step, x in zip(recording.steps, inputs[layer], strict=True):
            dense = (x.flatten(0, 1) @ adapter.W_enc.T + adapter.b_enc).relu()
            torch.testing.assert_close(step.layers[layer].to_dense(), dense)
        whole = recording.layer(layer)
        assert isinstance(whole, ActiveFeatures)
        assert whole.num_tokens == 10 + 2 * (NEW_TOKENS - 1)


def test_the_readme_lists_what_is_covered():
    text = README.read_text(encoding="utf-8")
    assert text == readme_with_table(text), "run python tests/zoo.py"
