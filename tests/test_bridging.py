"""Pair checks, stream assembly and the objective, against by-hand passes in float64."""

import collections

import pytest
import torch
import zoo
from tiny import SHAPE, batch, randomise, tiny_llama, tiny_qwen2
from torch.nn import functional as F
from transformers import MistralConfig, Qwen2ForCausalLM

import tca_fast
from tca_fast import AdapterConfig, UserError
from tca_fast.bridging.objective import sample_cutoffs
from tca_fast.bridging.pair import check_pair, check_tokenizers
from tca_fast.bridging.steps import STEPS
from tca_fast.bridging.streams import build_streams, graft, load_adapted
from tca_fast.config import ObjectiveConfig

FAMILIES = {"qwen2": tiny_qwen2, "llama": tiny_llama}
CONFIG = AdapterConfig(num_features=19)


def streams_of(family, backbone="target", **overrides):
    base, target = FAMILIES[family](seed=1, **overrides), FAMILIES[family](seed=2, **overrides)
    streams = build_streams(base.double(), target.double(), CONFIG, backbone=backbone)
    streams.adapted.model.double()
    randomise(streams.adapted)
    return streams, base, target


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_share_everything_but_the_mlps(family):
    streams, base, target = streams_of(family)
    shared = {id(p) for p in target.parameters()}
    for name, parameter in streams.adapted.model.named_parameters():
        if ".mlp.mlp." in name:
            assert torch.equal(parameter, base.get_parameter(name.replace(".mlp.mlp.", ".mlp.")))
            assert id(parameter) not in shared
        elif ".adapter." not in name:
            assert id(parameter) in shared, name
    trainable = {n for n, p in streams.adapted.model.named_parameters() if p.requires_grad}
    assert trainable and all(".adapter." in name for name in trainable)
    assert not any(p.requires_grad for p in target.parameters())


def test_the_base_backbone_is_the_base():
    streams, base, target = streams_of("qwen2", backbone="base")
    before = tiny_qwen2(seed=1).double()
    inputs = batch()["input_ids"]
    with streams.adapted.disabled():
        assert torch.equal(streams.adapted.model(inputs).logits, before(inputs).logits)
    assert streams.reference is target


def test_a_tied_base_keeps_the_heads_of_the_target():
    """The reference ties the target's head to its embedding here (contract §2.4)."""
    base, target = tiny_qwen2(seed=1, tie_word_embeddings=True), tiny_qwen2(seed=2)
    with pytest.raises(UserError, match="tie_word_embeddings is True in the base and False"):
        build_streams(base, target, CONFIG)
    streams = build_streams(base, target, CONFIG, accept=("tie_word_embeddings",))
    assert streams.adapted.model.lm_head.weight is target.lm_head.weight
    with pytest.raises(UserError, match="tie_word_embeddings"):
        build_streams(base, target, CONFIG, backbone="base", accept=("tie_word_embeddings",))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 2),
        ("hidden_size", 16),
        ("intermediate_size", 44),
        ("vocab_size", 60),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_with_both_values(field, value):
    base, target = tiny_qwen2(**{field: value}).config, tiny_qwen2().config
    with pytest.raises(UserError) as error:
        check_pair(base, target)
    ours, theirs = getattr(base, field), getattr(target, field)
    if field == "rope_parameters":
        field, ours, theirs = "rope_parameters.rope_theta", 5e5, 1e4
    assert f"pair: {field} is {ours!r} in the base and {theirs!r} in the target" in str(error.value)
    assert "\n" not in str(error.value)


def test_one_object_cannot_be_the_adapted_and_the_reference_stream():
    model = tiny_qwen2()
    with pytest.raises(UserError, match="one object"):
        build_streams(model, model, CONFIG, backbone="base")
    streams = build_streams(model, model, CONFIG)
    randomise(streams.adapted)
    assert not torch.equal(*(m(**batch()).logits for m in (streams.adapted.model, model)))


def test_windows_must_be_equal_where_each_model_has_its_own_attention():
    base, target = (MistralConfig(**SHAPE, sliding_window=window) for window in (4, None))
    check_pair(base, target)
    with pytest.raises(UserError, match="sliding_window is 4 in the base and None in the target"):
        check_pair(base, target, backbone="base")


def test_other_families_are_refused():
    with pytest.raises(UserError, match="model_type is 'llama' in the base and 'qwen2'"):
        check_pair(tiny_llama().config, tiny_qwen2().config)


def test_tokenizers_may_differ_in_added_tokens_only():
    Vocabulary = collections.namedtuple("Vocabulary", "ordinary added")

    class Tokenizer:
        def __init__(self, ordinary, added):
            self.maps = Vocabulary(ordinary, added)

        def get_added_vocab(self):
            return self.maps.added

        def get_vocab(self):
            return {**self.maps.ordinary, **self.maps.added}

    base = Tokenizer({"a": 0, "b": 1}, {"<im_start>": 2})
    check_tokenizers(base, Tokenizer({"a": 0, "b": 1}, {"<User>": 2}))
    with pytest.raises(UserError, match="'b' the id 1 in the base and 3 in the target"):
        check_tokenizers(base, Tokenizer({"a": 0, "b": 3}, {}))


@pytest.mark.parametrize("backbone", ["target", "base"])
def test_a_checkpoint_brings_its_models_along(tmp_path, backbone):
    """Train-time stream, saved, equals what `load_adapted` assembles from the recorded names."""
    from tca_fast.adapter_config import Provenance

    for name, seed in (("base", 1), ("target", 2)):
        tiny_qwen2(seed=seed).save_pretrained(tmp_path / name)
    streams = build_streams(tiny_qwen2(seed=1), tiny_qwen2(seed=2), CONFIG, backbone=backbone)
    randomise(streams.adapted)
    names = {"base": str(tmp_path / "base"), "target": str(tmp_path / "target")}
    streams.adapted.save_pretrained(tmp_path / "a", Provenance(**names, backbone=backbone))
    inputs = batch()["input_ids"]
    expected = streams.adapted.model(inputs).logits
    assert torch.equal(load_adapted(tmp_path / "a").model(inputs).logits, expected)

    streams.adapted.save_pretrained(tmp_path / "b", Provenance(backbone=backbone))
    with pytest.raises(UserError, match="does not say which model it was; pass base="):
        load_adapted(tmp_path / "b")
    assert torch.equal(load_adapted(tmp_path / "b", **names).model(inputs).logits, expected)


def named_models(root, roles):
    """Models loaded from directories, so that they know their names."""
    for seed, role in enumerate(roles, 1):
        tiny_qwen2(seed=seed).save_pretrained(root / role)
    return [Qwen2ForCausalLM.from_pretrained(root / role).eval() for role in roles]


def test_adapters_attached_to_a_plain_model_need_no_target(tmp_path):
    from tca_fast.adapter_config import read_adapter_config

    (model,) = named_models(tmp_path, ["only"])
    adapted = tca_fast.attach(model, CONFIG)
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "a")
    found = read_adapter_config(tmp_path / "a").provenance
    assert (found.base, found.target, found.backbone) == (str(tmp_path / "only"), None, "base")
    inputs = batch()["input_ids"]
    expected = adapted.model(inputs).logits
    assert torch.equal(load_adapted(tmp_path / "a").model(inputs).logits, expected)
    (tmp_path / "only").rename(tmp_path / "moved")
    loaded = load_adapted(tmp_path / "a", base=str(tmp_path / "moved"))
    assert torch.equal(loaded.model(inputs).logits, expected)

    with pytest.raises(UserError, match="fingerprint.*load .*only, or") as caught:
        tca_fast.load(tiny_qwen2(seed=2), tmp_path / "a")
    assert "hybrid" not in str(caught.value)


def test_adapters_of_an_architecture_without_sdpa_load(tmp_path):
    from tca_fast.bridging.streams import load_model
    from tca_fast.config import PairConfig

    name = str(tmp_path / "only")
    zoo.make("gpt-oss").save_pretrained(name)
    pair = PairConfig(base=name, target=name)
    with pytest.raises(UserError, match="choose another pair.attn_implementation, such as eager"):
        load_model("pair.base", name, None, pair, "cpu")
    eager = pair.model_copy(update={"attn_implementation": "eager"})
    adapted = tca_fast.attach(load_model("pair.base", name, None, eager, "cpu").eval(), CONFIG)
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "a")
    inputs = batch()["input_ids"]
    expected = adapted.model(inputs).logits
    assert torch.equal(load_adapted(tmp_path / "a").model(inputs).logits, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype: 'bf16' does not fit; give one of 'auto', .*'bfloat16'"),
        ({"dtype": torch.bfloat16}, "dtype: torch.bfloat16 does not fit; give one of 'auto'"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used here .*; give 'cpu'"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used here .*; give 'cpu'"),
        ({"device": None}, "device: 'None' cannot be used here .*; give 'cpu'"),
    ],
)
def test_a_dtype_or_device_there_is_not_is_one_line(tmp_path, options, message):
    (model,) = named_models(tmp_path, ["only"])
    tca_fast.attach(model, CONFIG).save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=message) as caught:
        load_adapted(tmp_path / "a", **options)
    assert "\n" not in str(caught.value)
    load_adapted(tmp_path / "a", device=torch.device("cpu"))


@pytest.mark.parametrize("way", ["build_streams", "load_adapted"])
def test_fresh_adapters_on_a_hybrid_are_saved_with_both_its_models(tmp_path, way):
    from tca_fast.adapter_config import read_adapter_config

    adapted = build_streams(*named_models(tmp_path, ["base", "target"]), CONFIG).adapted
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "a")
    if way == "load_adapted":
        adapted = load_adapted(tmp_path / "a")
        adapted.add("fresh", CONFIG)
        adapted.use("fresh")
        randomise(adapted, seed=5)
        adapted.save_pretrained(tmp_path / "a")
    found = read_adapter_config(tmp_path / "a").provenance
    names = [str(tmp_path / "base"), str(tmp_path / "target"), "target"]
    assert [found.base, found.target, found.backbone] == names
    inputs = batch()["input_ids"]
    expected = adapted.model(inputs).logits
    assert torch.equal(load_adapted(tmp_path / "a").model(inputs).logits, expected)


def by_hand(front, back, cutoff, input_ids, attention_mask):
    """mixed(X, Y, k) of contract §3.4 for Qwen2 and Llama, layer by layer; also the states."""
    h = front.model.embed_tokens(input_ids)
    position_ids = torch.arange(input_ids.shape[1]).unsqueeze(0)
    S = input_ids.shape[1]
    allowed = torch.ones(S, S, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]
    bias = torch.zeros(allowed.shape, dtype=h.dtype).masked_fill(~allowed, torch.finfo(h.dtype).min)
    states = []
    for i in range(len(back.model.layers)):
        model = front if i < cutoff else back
        states.append(h)
        h = model.model.layers[i](
            h,
            attention_mask=bias,
            position_embeddings=model.model.rotary_emb(h, position_ids),
        )
    states.append(h)
    return back.lm_head(back.model.norm(h)), states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", ["target", "base"])
def test_grafts_are_the_mixed_models_of_the_contract(family, backbone):
    streams, *_ = streams_of(family, backbone)
    inputs = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for cutoff in range(streams.num_layers + 1):
        for front, back in (streams, reversed(streams)):
            front, back = (
                getattr(m, "model", m) if m is streams.adapted else m for m in (front, back)
            )
            ours = graft(front, back, cutoff)(input_ids=ids, attention_mask=mask).logits
            expected, _ = by_hand(front, back, cutoff, ids, mask)
            torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()])


def objective_by_hand(streams, config, inputs, cutoffs):
    """J of contract §3.5, term by term, with softmax and means written out."""
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    A, R, L = streams.adapted.model, streams.reference, streams.num_layers
    logits_R, states_R = by_hand(R, R, 0, ids, mask)
    counted = labels[:, 1:] != -100

    def distance(logits):
        if config.loss == "lm":
            return F.cross_entropy(logits[:, :-1][counted], labels[:, 1:][counted])
        p = logits_R[:, :-1].softmax(-1)
        kl = (p * (p.log() - logits[:, :-1].softmax(-1).log())).sum(-1)
        return kl[counted].mean()

    seen = {}
    hooks = [
        w.register_forward_pre_hook(lambda m, args: seen.setdefault(m.layer, args[0]))
        for w in streams.adapted.wrapped
    ]
    logits_A, states_A = by_hand(A, A, 0, ids, mask)
    [hook.remove() for hook in hooks]
    real = mask.bool()
    l1 = 0.0
    for layer, adapter in enumerate(streams.adapted.layers):
        features = (seen[layer][real] @ adapter.W_enc.T + adapter.b_enc).relu()
        l1 = l1 + (features * adapter.W_dec.norm(dim=1)).sum(-1).mean()
    nmse = torch.stack(
        [
            (a[real] - r[real]).square().mean() / (r[real].square().mean() + 1e-8)
            for a, r in zip(states_A, states_R, strict=True)
        ]
    ).mean()
    bridge = torch.zeros((), dtype=torch.float64)
    for k in cutoffs:
        if k >= 1:
            bridge = bridge + distance(by_hand(A, R, k, ids, mask)[0]) / len(cutoffs)
        if k <= L - 1:
            bridge = bridge + distance(by_hand(R, A, k, ids, mask)[0]) / len(cutoffs)
    return (
        config.lambda_adapt * distance(logits_A)
        + config.l1_weight * l1
        + config.lambda_nmse * nmse
        + config.lambda_bridge * bridge
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", ["target", "base"])
@pytest.mark.parametrize("cutoffs", [[], [0], [3], [1], [0, 2, 3]], ids=str)
@pytest.mark.parametrize("loss", ["kl", "lm"])
@pytest.mark.parametrize("step", STEPS)
def test_objective_and_gradients_equal_the_contract(family, backbone, cutoffs, loss, step):
    streams, *_ = streams_of(family, backbone)
    config = ObjectiveConfig(
        loss=loss, lambda_adapt=0.7, l1_weight=0.03, lambda_nmse=1.3, lambda_bridge=1.9
    )
    inputs = batch()
    output = STEPS[step](streams, config)(**inputs, cutoffs=cutoffs)
    expected = objective_by_hand(streams, config, inputs, cutoffs)
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=1e-12)
    parameters = list(streams.adapted.parameters())
    ours = torch.autograd.grad(output.loss, parameters)
    for a, b in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        if step == "plain":
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
        # Hugging Face's norms compute in float32 whatever the model, and backward of a scaled
        # gradient rounds otherwise there than the scaled backward, which the shared step takes: a
        # few roundings, in norm.
        assert (a - b).norm() <= 8 * torch.finfo(torch.float32).eps * b.norm()


@pytest.mark.parametrize("step", STEPS)
def test_shares_of_micro_batches_add_up(step):
    """KL, LM and L1 of two micro-batches, divided by global counts, sum to those of the whole."""
    streams, *_ = streams_of("qwen2")
    objective = STEPS[step](streams, ObjectiveConfig())
    inputs = batch()
    whole = objective(**inputs, cutoffs=[1]).metrics
    counts = {
        "label_tokens": (inputs["labels"][:, 1:] != -100).sum(),
        "real_tokens": inputs["attention_mask"].sum(),
    }
    total = collections.Counter()
    for row in range(2):
        part = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        total.update(objective(**part, cutoffs=[1], **counts).metrics)
    for name in whole:
        if "nmse" not in name and name != "loss":
            torch.testing.assert_close(total[name], whole[name], msg=name)


@pytest.mark.parametrize("step", STEPS)
def test_a_batch_without_labels_is_finite(step):
    streams, *_ = streams_of("qwen2")
    inputs = batch()
    inputs["labels"][:] = -100
    output = STEPS[step](streams, ObjectiveConfig())(**inputs, cutoffs=[1])
    assert output.metrics["kl"] == 0 and output.loss.isfinite()


def test_cutoffs_depend_on_seed_and_step_only_and_are_uniform():
    config = ObjectiveConfig(num_cutoffs=2)
    draws = [tuple(sample_cutoffs(config, 4, seed=7, step=s)) for s in range(4000)]
    assert draws == [tuple(sample_cutoffs(config, 4, seed=7, step=s)) for s in range(4000)]
    assert draws[:50] != [tuple(sample_cutoffs(config, 4, seed=8, step=s)) for s in range(50)]
    counts = collections.Counter(k for draw in draws for k in draw)
    assert set(counts) == {0, 1, 2, 3, 4} and all(len(set(draw)) == 2 for draw in draws)
    # 1600 expected each; the standard deviation is 31.
    assert all(abs(count - 1600) < 5 * 31 for count in counts.values())


def test_cutoffs_can_be_fixed_or_off():
    assert sample_cutoffs(ObjectiveConfig(cutoffs=[1, 3]), 4, seed=0, step=0) == [1, 3]
    assert sample_cutoffs(ObjectiveConfig(num_cutoffs=0), 4, seed=0, step=0) == []
    with pytest.raises(UserError, match="objective.cutoffs: 5 is outside 0..4"):
        sample_cutoffs(ObjectiveConfig(cutoffs=[1, 5]), 4, seed=0, step=0)
    with pytest.raises(UserError, match="objective.num_cutoffs: 6 exceeds the 5"):
        sample_cutoffs(ObjectiveConfig(num_cutoffs=6), 4, seed=0, step=0)
