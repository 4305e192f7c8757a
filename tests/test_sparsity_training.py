"""L1 warm-up and the auxiliary loss, against their formulas written out."""

import shutil

import pytest
import torch
from tiny import batch, randomise, tiny_qwen2
from tiny_pair import records

from tca_fast.bridging.auxiliary import auxiliary_loss, explain
from tca_fast.bridging.objective import l1_scale_at
from tca_fast.bridging.shared import SharedObjective
from tca_fast.bridging.steps import STEPS
from tca_fast.bridging.streams import build_streams
from tca_fast.config import AdapterConfig, ObjectiveConfig, load_config
from tca_fast.errors import UserError
from tca_fast.sparsity import FeatureAges
from tca_fast.training.run import train

LAYERS, WIDTH, FEATURES, K = 3, 24, 20, 4


def streams(activation="topk"):
    k = {"k": 3} if activation == "topk" else {}
    adapter = AdapterConfig(num_features=FEATURES, activation=activation, **k)
    made = build_streams(tiny_qwen2(seed=1), tiny_qwen2(seed=2), adapter)
    randomise(made.adapted)
    return made


def dead_features(seed=3):
    """Some dead in every layer, more than K, none in the last layer."""
    dead = torch.rand(LAYERS, FEATURES, generator=torch.Generator().manual_seed(seed)) < 0.4
    dead[0, :K] = True
    dead[2] = False
    return dead


def tensors(seed=4):
    """Inputs, states and reference states of a made-up pass, and a mask."""
    generator = torch.Generator().manual_seed(seed)

    def make(number):
        return [torch.randn(2, 11, WIDTH, generator=generator) for _ in range(number)]

    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 7:] = False
    return make(LAYERS), make(LAYERS + 1), make(LAYERS + 1), mask


def by_hand(adapters, inputs, states, reference_states, mask, dead, k):
    """The formula with loops over layers and tokens."""
    total = 0.0
    for layer, adapter in enumerate(adapters):
        missed = energy = 0.0
        for b, s in mask.nonzero().tolist():
            x = inputs[layer][b, s]
            error = (reference_states[layer + 1] - states[layer + 1])[b, s].detach()
            z = adapter.W_enc @ x + adapter.b_enc
            numbers = [i for i in range(FEATURES) if dead[layer, i]]
            numbers = sorted(numbers, key=lambda i: -z[i].item())[:k]
            explained = sum(z[i].relu() * adapter.W_dec[i] for i in numbers)
            missed = missed + (explained - error).square().sum()
            energy = energy + error.square().sum()
        share = min(1.0, int(dead[layer].sum()) / k)
        total = total + share * missed / energy
    return total / len(adapters)


def test_the_auxiliary_loss_is_its_formula():
    adapters = streams().adapted.layers
    *made, mask = tensors()
    dead = dead_features()
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    ours = auxiliary_loss(adapters, *made, mask, dead, K)
    theirs = by_hand(adapters, *made, mask, dead, K)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = torch.autograd.grad(ours, parameters, allow_unused=True)
    expected = torch.autograd.grad(theirs, parameters, allow_unused=True)
    for found, right in zip(gradients, expected, strict=True):
        if right is None:
            assert found is None or not found.any()
            continue
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-6)


def test_only_dead_features_get_a_gradient():
    """No living feature, no decoder bias, no other stream: the errors others have made here."""
    adapters = streams().adapted.layers
    inputs, states, reference_states, mask = tensors()
    for tensor in (*inputs, *states, *reference_states):
        tensor.requires_grad_()
    dead = dead_features()
    auxiliary_loss(adapters, inputs, states, reference_states, mask, dead, K).backward()
    for layer, adapter in enumerate(adapters):
        alive = ~dead[layer]
        assert adapter.b_dec.grad is None
        for parameter in (adapter.W_enc, adapter.b_enc, adapter.W_dec):
            assert parameter.grad is None or not parameter.grad[alive].any()
            assert layer == 2 or parameter.grad[dead[layer]].any()
    for tensor in (*states, *reference_states):
        assert tensor.grad is None


def test_the_decoder_bias_is_not_added_again():
    adapter = streams().adapted.layers[0]
    x, dead = torch.randn(2, 5, WIDTH), dead_features()[0]
    before = explain(adapter, x, dead, K)
    with torch.no_grad():
        adapter.b_dec.add_(7.0)
    assert torch.equal(explain(adapter, x, dead, K), before)
    assert not explain(adapter, x, torch.zeros_like(dead), K).any()


def test_without_dead_features_or_error_it_is_zero():
    adapters = streams().adapted.layers
    inputs, states, reference_states, mask = tensors()
    none = torch.zeros(LAYERS, FEATURES, dtype=torch.bool)
    assert auxiliary_loss(adapters, inputs, states, reference_states, mask, none, K) == 0
    scaled = [10 * state for state in states], [10 * state for state in reference_states]
    with torch.no_grad():
        for adapter in adapters:
            adapter.W_dec.zero_()
    dead = dead_features()
    # Nothing is explained: the error over itself, whatever its size, for two layers of three.
    for pair in ((states, reference_states), scaled):
        found = auxiliary_loss(adapters, inputs, *pair, mask, dead, K)
        assert found.item() == pytest.approx(2 / 3, rel=1e-5)
    assert torch.isfinite(auxiliary_loss(adapters, inputs, states, states, mask, dead, K))


def test_dead_is_counted_in_tokens():
    ages = FeatureAges(1, 3)
    ages.update(torch.tensor([[True, False, False]]), 10)
    ages.update(torch.tensor([[False, True, False]]), 5)
    assert ages.dead(15).tolist() == [[False, False, True]]
    assert ages.dead(5).tolist() == [[True, False, True]]
    assert ages.num_dead(5).tolist() == [2]


# The plain step has no checkpointing.
@pytest.mark.parametrize(
    ("step", "checkpointing"), [("plain", False), ("shared", False), ("shared", True)]
)
def test_it_is_part_of_the_objective(step, checkpointing):
    inputs, dead = batch(), dead_features()
    base = {"step": step, "gradient_checkpointing": checkpointing, "l1_weight": 0.0}
    made = streams()
    without = STEPS[step](made, ObjectiveConfig(**base))(**inputs, cutoffs=[1])
    config = ObjectiveConfig(**base, auxk_weight=0.5, auxk_k=K)
    objective = STEPS[step](made, config)
    output = objective(**inputs, cutoffs=[1], dead=dead)
    difference = output.loss - without.loss
    assert difference.item() == pytest.approx(0.5 * output.metrics["auxk"].item(), rel=1e-3)
    assert output.metrics["auxk"] > 0 and "auxk" not in without.metrics
    output.loss.backward()
    assert made.adapted.layers[0].W_enc.grad[dead[0]].any()
    assert objective(**inputs, cutoffs=[1]).metrics["auxk"] == 0


def test_checkpointing_changes_no_gradient_of_it():
    gradients = []
    for checkpointing in (False, True):
        made = streams()
        config = ObjectiveConfig(auxk_weight=0.5, auxk_k=K, gradient_checkpointing=checkpointing)
        SharedObjective(made, config)(**batch(), cutoffs=[1], dead=dead_features()).loss.backward()
        gradients.append([p.grad for p in made.adapted.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_l1_alone_has_a_loss_before_its_warmup_begins():
    others = {"lambda_adapt": 0, "lambda_nmse": 0, "lambda_bridge": 0}
    objective = SharedObjective(streams("relu"), ObjectiveConfig(l1_warmup_steps=4, **others))
    loss = objective(**batch(), cutoffs=[], l1_scale=0.0).loss
    loss.backward()
    assert loss == 0


def test_l1_warmup_is_linear_and_ends():
    config = ObjectiveConfig(l1_warmup_steps=4)
    assert [l1_scale_at(step, config) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert l1_scale_at(0, ObjectiveConfig()) == 1
    made, inputs = streams("relu"), batch()
    config = ObjectiveConfig(l1_weight=0.3)
    objective = SharedObjective(made, config)
    whole, half, none = (
        objective(**inputs, cutoffs=[], l1_scale=scale) for scale in (1.0, 0.5, 0.0)
    )
    l1 = whole.metrics["l1"]
    assert (whole.loss - none.loss).item() == pytest.approx(0.3 * l1.item(), rel=1e-4)
    assert (half.loss - none.loss).item() == pytest.approx(0.15 * l1.item(), rel=1e-4)


def test_a_run_warms_up_and_revives(pair, tmp_path):
    topk = ["adapter.activation=topk", "adapter.k=2", "run.dead_after_tokens=50"]
    topk += ["objective.auxk_weight=0.03125", "objective.l1_warmup_steps=4", "run.max_steps=8"]
    topk += ["run.eval_steps=4", "run.save_steps=4"]
    settings = [f"run.output_dir={tmp_path}/run", *topk]
    train(load_config(pair / "run.yaml", settings), show_progress=False)
    log = records(tmp_path / "run")
    assert log[0]["auxk"] == 0, "nothing is dead yet"
    assert any(row["auxk"] > 0 and row["dead_features"] > 0 for row in log)
    for row in log:
        share = l1_scale_at(row["step"] - 1, ObjectiveConfig(l1_warmup_steps=4))
        terms = row["kl"] + row["nmse"] + 2 * row["bridge"] + row["auxk"] / 32
        assert row["loss"] == pytest.approx(terms + 0.01 * share * row["l1"], rel=1e-4)
    # Its ages come with the checkpoint: the second half alone gives the same.
    resumed = [f"run.output_dir={tmp_path}/half", *topk]
    half = load_config(pair / "run.yaml", resumed)
    shutil.copytree(
        tmp_path / "run" / "checkpoints" / "step_000004",
        tmp_path / "half" / "checkpoints" / "step_000004",
    )
    run = half.run.model_copy(update={"resume_from_checkpoint": "latest"})
    train(half.model_copy(update={"run": run}), show_progress=False)
    assert [row["auxk"] for row in records(tmp_path / "half")] == [row["auxk"] for row in log[4:]]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("objective.auxk_weight=0.1", "auxk_weight=0.1 .*'relu'; set it to 0"),
        ("objective.auxk_k=100", "auxk_k=100 exceeds adapter.num_features=48"),
    ],
)
def test_settings_that_do_not_fit(pair, setting, expected):
    with pytest.raises(UserError, match=expected):
        load_config(pair / "run.yaml", [setting])
