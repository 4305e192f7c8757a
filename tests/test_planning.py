"""The planner's arithmetic against figures counted by hand, by autograd, or by others."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tca_fast import cli
from tca_fast.bridging.inputs import Inputs
from tca_fast.bridging.partial import PartialRunner
from tca_fast.config import AdapterConfig, ObjectiveConfig, load_config
from tca_fast.errors import UserError
from tca_fast.planning.communication import step_traffic
from tca_fast.planning.devices import DEVICES, GIB, find_device, step_rate
from tca_fast.planning.memory import (
    MemoryPlan,
    Placement,
    _frozen_layer,
    adapter_parameters,
    plan_memory,
)
from tca_fast.planning.passes import layer_passes, layer_work, step_flops
from tca_fast.planning.plan import KNOWN_DATA, Planner, Workload
from tca_fast.planning.shapes import KNOWN, ModelShape, read_shape
from tca_fast.training import forecast
from tca_fast.training.run import train

CONFIGS = Path(__file__).parents[1] / "configs"
_7B = read_shape("Qwen/Qwen2.5-Math-7B", "pair.base")
SMALL = ModelShape(64, 96, 4, 4, 2, 16, 100, attention_bias=True)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Parameters of the weights as the hub shows them.
        ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
        ("Qwen/QwQ-32B", 32_763_876_352),
    ],
)
def test_known_shapes_have_the_parameters_of_the_weights(name, parameters):
    assert read_shape(name, "pair.target").parameters == parameters


@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_of_a_shape_are_those_of_the_model(tmp_path, is_tied):
    config = Qwen2Config(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=77,
        tie_word_embeddings=is_tied,
    )
    config.save_pretrained(tmp_path)
    model = Qwen2ForCausalLM(config)
    assert read_shape(str(tmp_path), "pair.base").parameters == model.num_parameters()


def test_adapter_parameters_of_the_paper():
    """contract §8."""
    adapter = AdapterConfig(num_features=8192)
    assert adapter_parameters(_7B, adapter) == 1_644_496_896
    small = read_shape("Qwen/Qwen2.5-Math-1.5B", "pair.base")
    assert adapter_parameters(small, adapter) == 704_915_456
    large = read_shape("Qwen/Qwen2.5-32B", "pair.base")
    assert adapter_parameters(large, AdapterConfig(num_features=16384)) == 10_738_794_496


def test_passes_of_28_layers():
    """performance §4: 41.03 / 41.03 / 41.03 / 13.03, heads 3.86 / 2.86."""
    found = layer_passes(28, ObjectiveConfig(), shares_ends=True)
    expected = (41.03, 41.03, 41.03, 13.03, 3.86, 2.86)
    assert [round(value, 2) for value in found] == pytest.approx(expected)


@pytest.mark.parametrize("shares_ends", [True, False])
@pytest.mark.parametrize("num_cutoffs", [0, 1, 2])
def test_passes_are_the_mean_over_cutoffs(shares_ends, num_cutoffs):
    """Every cutoff counted by itself, for a depth of 5."""
    objective = ObjectiveConfig(num_cutoffs=num_cutoffs)
    found = layer_passes(5, objective, shares_ends=shares_ends)
    a2r = r2a = heads = 0.0
    for k in range(6):
        if k >= 1 and not (shares_ends and k == 5):
            a2r, heads = a2r + (5 - k), heads + 1
        if k <= 4 and not (shares_ends and k == 0):
            r2a, heads = r2a + (5 - k), heads + 1
    a2r, r2a, heads = (num_cutoffs * value / 6 for value in (a2r, r2a, heads))
    expected = (5 + r2a, 5 + a2r, 5 + r2a, a2r, 2 + heads, 1 + heads)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "is_dense", "teraflops"),
    [(8192, False, 704), (8192, True, 803), (10000, False, 888)],
)
def test_operations_of_a_step(tokens, is_dense, teraflops):
    """performance §4, "sharing + sparse" and "all sharing, dense adapters"."""
    passes = layer_passes(28, ObjectiveConfig(), shares_ends=True)
    found = step_flops(passes, layer_work(_7B, 8192, tokens, 1, is_dense=is_dense))
    assert found / 1e12 == pytest.approx(teraflops, rel=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_frozen_layer_keeps_what_autograd_saves(dtype, sequences):
    config = Qwen2Config(
        hidden_size=SMALL.hidden_size,
        intermediate_size=SMALL.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=SMALL.num_attention_heads,
        num_key_value_heads=SMALL.num_key_value_heads,
        vocab_size=SMALL.vocab_size,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config).to(dtype).eval().requires_grad_(False)
    ids = torch.randint(0, 100, (sequences, 32))
    mask = torch.ones_like(ids)
    if sequences > 1:
        mask[0, 20:] = 0
    with torch.no_grad():
        trace = PartialRunner(model).run(Inputs(ids, mask.bool(), ids))
    call, state = trace.calls[0], trace.states[0].clone().requires_grad_()
    tables = [*call.kwargs["position_embeddings"], call.kwargs.get("attention_mask")]
    given = {
        t.untyped_storage().data_ptr()
        for t in [state, *tables, *model.parameters()]
        if t is not None
    }
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        # Kept, or a storage could be freed and its address used again.
        output = model.model.layers[0](state, *call.args, **call.kwargs)
    found = sum(size for pointer, size in saved.items() if pointer not in given)
    del output
    expected = _frozen_layer(SMALL, ids.numel(), 32 if sequences > 1 else 0, dtype.itemsize)
    assert found == expected


def memory(**changes) -> MemoryPlan:
    options = {"tokens": 512, "placement": Placement(2, 4)} | changes
    return plan_memory(SMALL, AdapterConfig(num_features=256), ObjectiveConfig(), **options)


def test_stages_divide_what_they_say():
    """The state of N ranks by hand: A parameters, bfloat16 weights, float32 copy and moments."""
    trained = 4 * (2 * 64 * 256 + 256 + 64)
    frozen = SMALL.parameters - 4 * SMALL.mlp_parameters
    for stage, of_state, of_weights in ((1, 4, 1), (2, 4, 1), (3, 4, 4)):
        parts = memory(placement=Placement(stage, 4)).parts
        assert parts["adapters"] == 2 * trained // of_weights
        assert parts["adapters, master copy"] == 4 * trained // of_state
        assert parts["optimizer"] == 8 * trained // of_state
        assert parts["frozen, in both streams"] == 2 * frozen // of_weights
        assert parts["frozen, MLPs of both"] == 2 * 2 * 4 * SMALL.mlp_parameters // of_weights
    alone = memory(placement=Placement(None, 1)).parts
    assert alone["adapters"] == 4 * trained and alone["optimizer"] == 8 * trained
    base = memory(placement=Placement(None, 1, backbone="base")).parts
    assert base["frozen, in both streams"] == 2 * alone["frozen, in both streams"]


def test_parts_add_up_and_checkpointing_keeps_inputs_only():
    plain = memory()
    assert plain.peak == sum(plain.parts.values())
    checkpointed = plan_memory(
        SMALL,
        AdapterConfig(num_features=256),
        ObjectiveConfig(gradient_checkpointing=True),
        tokens=512,
        placement=Placement(2, 4),
    )
    # Of the main pass nothing but its residual states, counted as such.
    assert checkpointed.parts["activations, adapter stream"] == 0
    assert checkpointed.parts["activations, a2r"] <= 4 * 512 * 64 * 2
    assert checkpointed.peak < plain.peak


def test_topk_keeps_k_features_of_a_token():
    sparse = plan_memory(
        SMALL,
        AdapterConfig(num_features=256, activation="topk", k=8),
        ObjectiveConfig(num_cutoffs=0),
        tokens=512,
        placement=Placement(None, 1),
    )
    dense = plan_memory(
        SMALL,
        AdapterConfig(num_features=256),
        ObjectiveConfig(num_cutoffs=0),
        tokens=512,
        placement=Placement(None, 1),
    )
    name = "activations, adapter stream"
    assert dense.parts[name] - sparse.parts[name] == 4 * 512 * (256 * 2 - 8 * (2 + 4))


def test_traffic_by_hand():
    """A parameters over N ranks in bfloat16: 2·(N-1)/N·A·2 bytes, whatever the stage below 3."""
    adapter = AdapterConfig(num_features=8192)
    passes = layer_passes(28, ObjectiveConfig(), shares_ends=True)
    of_stage = [
        step_traffic(_7B, adapter, passes, stage=stage, num_ranks=8).num_bytes
        for stage in (0, 1, 2, 3)
    ]
    reduced = 2 * 7 / 8 * 1_644_496_896 * 2
    assert of_stage[:3] == pytest.approx([reduced, 1.5 * reduced, 1.5 * reduced])
    # Stage 3 by hand: gradients once, and the weights of every layer pass and both heads.
    frozen = _7B.mlp_parameters + _7B.attention_parameters
    gathered = (82.06896551724138 + 54.06896551724138) * frozen
    gathered += 82.06896551724138 * 1_644_496_896 / 28 + 2 * _7B.outer_parameters
    assert of_stage[3] == pytest.approx(7 / 8 * 2 * (1_644_496_896 + gathered))
    accumulated = step_traffic(_7B, adapter, passes, stage=2, num_ranks=8, micro_batches=4)
    assert accumulated.num_bytes == pytest.approx(4.5 * reduced)
    assert step_traffic(_7B, adapter, passes, stage=2, num_ranks=1).num_bytes == 0


def test_slower_links_between_nodes():
    device = DEVICES["h100-80gb"]
    traffic = step_traffic(
        _7B,
        AdapterConfig(),
        layer_passes(28, ObjectiveConfig(), shares_ends=True),
        stage=1,
        num_ranks=16,
    )
    start_up = traffic.num_collectives * 10e-6
    inside = traffic.seconds(device, 8) - 3 * start_up
    between = traffic.seconds(device, 16) - 4 * start_up
    assert between / inside == pytest.approx(450 / (8 * 50))
    assert traffic.seconds(device, 1) == 0


def planner(*overrides, rate=None, gpu="h100-80gb", tokens=7000) -> Planner:
    config = load_config(CONFIGS / "r1_distill_7b.yaml", overrides)
    device = find_device(gpu)
    return Planner(
        config, _7B, device, rate or step_rate(device, []), Workload(1000, tokens, False)
    )


def test_the_longest_sequence_is_the_last_that_fits():
    ours = planner()
    most = ours.most_tokens(2, 8, checkpointing=True)
    assert ours.fits(ours.memory(2, 8, tokens=most, checkpointing=True))
    assert not ours.fits(ours.memory(2, 8, tokens=most + 1, checkpointing=True))


def test_a_packed_row_is_planned_as_the_sequences_it_holds():
    budget = ["run.train_batch_tokens=160000", "run.per_device_train_batch_tokens=20000"]
    packed = planner(*budget, tokens=5000)
    sizes = ["run.train_batch_size=32", "run.per_device_train_batch_size=4"]
    padded = planner(*sizes, "data.max_length=5000", tokens=5000)
    for ranks in (1, 8, 16):
        assert packed.batch_size(ranks) == padded.batch_size(ranks)
        assert packed.scale(2, ranks) == padded.scale(2, ranks)


@pytest.mark.parametrize(
    ("name", "ranks"), [("r1_distill_1p5b", 8), ("r1_distill_7b", 8), ("qwq_32b", 16)]
)
def test_the_readme_says_what_the_plan_does(name, ranks):
    config, device = load_config(CONFIGS / f"{name}.yaml"), find_device("h100-80gb")
    tokens = config.data.max_length
    workload = Workload(KNOWN_DATA[config.data.train], tokens, True, config.run.num_epochs)
    shape = read_shape(config.pair.target, "pair.target")
    ours = Planner(config, shape, device, step_rate(device, []), workload)
    stage, checkpointing = ours.cheapest(ranks)
    peaks = [ours.memory(stage, ranks, checkpointing=kept).peak / GIB for kept in (False, True)]
    budget = ours.rows * ours.most_tokens(stage, ranks, checkpointing=checkpointing)
    row = f"| {name}, {tokens:,} tokens, {ranks} GPUs | {peaks[0]:.0f}, {peaks[1]:.0f} |"
    row += f" ZeRO-{stage}{', checkpointing' if checkpointing else ''} | {budget:,} |"
    row += f" {ours.scale(stage, ranks, checkpointing=checkpointing).gpu_hours:,.0f} |"
    assert row in (CONFIGS.parent / "README.md").read_text(encoding="utf-8")


def test_the_cheapest_is_the_fastest_that_fits():
    ours = planner()
    assert ours.cheapest(8) == (1, True)
    assert planner("data.max_length=1000", tokens=1000).cheapest(8) == (1, False)
    # On two nodes only ZeRO-3 fits without recomputing, and gathering costs more than recomputing.
    ours = planner("data.max_length=4000", tokens=4000)
    assert ours.fits(ours.memory(3, 16, checkpointing=False))
    assert not ours.fits(ours.memory(2, 16, checkpointing=False))
    assert ours.cheapest(16) == (1, True)
    times = [
        ours.step_time(*one, checkpointing=kept).total
        for *one, kept in ((1, 16, True), (3, 16, False))
    ]
    assert times[0] < times[1]
    big = load_config(CONFIGS / "qwq_32b.yaml", ["objective.gradient_checkpointing=true"])
    shape = read_shape("Qwen/QwQ-32B", "pair.target")
    ours = Planner(big, shape, ours.device, ours.rate, ours.workload)
    assert ours.cheapest(64) == (3, True)
    with pytest.raises(LookupError):
        ours.cheapest(1)


def test_time_of_a_run_by_hand():
    """888 Tflop a step of 10,000 tokens at 100 Tflop/s, and AdamW's 28 bytes a parameter."""
    ours = planner(tokens=10000)
    ours.rate = replace(ours.rate, flops=1e14)
    step = ours.step_time(None, 1)
    assert step.arithmetic == pytest.approx(8.88, rel=0.002)
    assert step.optimizer == pytest.approx(28 * 1_644_496_896 / 3.35e12)
    assert step.communication == 0
    scale = ours.scale(None, 1)
    assert scale.days == pytest.approx(1000 * step.total / 86400)
    assert scale.gpu_hours == pytest.approx(24 * scale.days)
    eight = ours.scale(1, 8)
    assert eight.batch_size == 8 and eight.efficiency < 1
    assert eight.gpu_hours > scale.gpu_hours


def test_packed_rows_are_full():
    packed = planner(
        "run.train_batch_tokens=160000", "run.per_device_train_batch_tokens=20000", tokens=5000
    )
    assert packed.micro_batches(2) == 4 and packed.batch_size(2) == 8 * 4
    rows = planner("data.max_length=20000", tokens=20000)
    masked = (
        packed.memory(2, 2, checkpointing=True).peak
        - packed.memory(2, 2, tokens=10000, checkpointing=True).peak
    )
    plain = (
        rows.memory(2, 2, checkpointing=True).peak
        - rows.memory(2, 2, tokens=10000, checkpointing=True).peak
    )
    # One recomputed layer keeps T² numbers of the mask, and keys and values for every head.
    more = 2 * (20000**2 - 10000**2) + 2 * 10000 * 2 * (3584 - 512)
    assert masked - plain == more
    # Four sequences in a row attend within themselves: fewer operations than one long row.
    assert packed.step_time(2, 8).arithmetic < rows.step_time(2, 8).arithmetic


def test_measured_rates_win_over_assumed_ones(tmp_path):
    device = DEVICES["h100-80gb"]
    assumed = step_rate(device, [])
    assert not assumed.is_measured and "assumed rates" in assumed.source
    shape = {name: value for name, value in KNOWN["Qwen/Qwen2.5-Math-7B"].items()}
    row = {
        "operation": "step",
        "variant": "shared",
        "case": "7B",
        "device": "NVIDIA H100 80GB HBM3",
        "tokens": 8192,
        "sequences": 1,
        "features": 8192,
        "mean_ms": 1000.0,
        "shape": shape,
        "cutoffs": list(range(29)),
    }
    other = row | {"device": "NVIDIA A100-SXM4-80GB", "mean_ms": 1.0}
    plain = row | {"variant": "plain", "mean_ms": 1.0}
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({"rows": [other, row, plain]}))
    (tmp_path / "broken.json").write_text("{")
    rate = step_rate(device, [tmp_path / "broken.json", path])
    assert rate.is_measured and "h100.json" in rate.source
    assert rate.flops == pytest.approx(704e12, rel=0.002)
    assert not step_rate(DEVICES["a100-40gb"], [path]).is_measured

    def measured(cutoffs):
        path.write_text(json.dumps({"rows": [row | {"cutoffs": cutoffs}]}))
        return step_rate(device, [path]).flops

    # What ran counts, not what is expected: at both ends no layer runs for the bridging.
    assert measured([0]) == measured([28]) < measured([20]) < measured([4])
    assert measured([4, 20]) == pytest.approx((measured([4]) + measured([20])) / 2)
    path.write_text(json.dumps({"rows": [row | {"device": "NVIDIA GH200 480GB"}]}))
    assert not step_rate(DEVICES["h200-141gb"], [path]).is_measured


# Before a run


def test_training_warns_of_a_run_that_will_not_fit(pair, tmp_path, monkeypatch, capsys):
    config = load_config(pair / "run.yaml", [f"run.output_dir={tmp_path}/run", "run.max_steps=1"])
    monkeypatch.setattr(forecast, "free_memory", lambda device, num_ranks: 2**20)
    train(config, show_progress=False)
    warning, *more = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")
    ]
    assert not more and "tca-fast plan" in warning and "gradient_checkpointing" in warning
    monkeypatch.setattr(forecast, "free_memory", lambda device, num_ranks: 2**40)
    config = load_config(pair / "run.yaml", [f"run.output_dir={tmp_path}/2", "run.max_steps=1"])
    train(config, show_progress=False)
    assert "warning: " not in capsys.readouterr().err


def test_free_memory_is_shared_by_the_ranks_of_a_machine():
    alone, shared = (forecast.free_memory(torch.device("cpu"), ranks) for ranks in (1, 4))
    if alone is None:
        pytest.skip("needs a system that says how much memory is free")
    assert shared == pytest.approx(alone / 4, rel=0.2)


# The command


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tca-fast", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize("name", ["r1_distill_1p5b", "r1_distill_7b", "qwq_32b"])
def test_the_shipped_configs_are_planned_offline(name, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, "plan", CONFIGS / f"{name}.yaml", "--nodes", 4) == 0
    printed = capsys.readouterr().out
    for expected in ("together", "cheapest that fits", "assumed rates", "1,024", "49,952"):
        assert expected in printed


def test_a_run_that_does_not_fit_says_so(monkeypatch, capsys):
    status = run(monkeypatch, "plan", CONFIGS / "qwq_32b.yaml", "--gpus", 1)
    assert status == 1 and "nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpu", "tpu"], ["--gpu", "'tpu'", "h100-80gb"]),
        (["pair.target=nowhere/at-all"], ["pair.target", "nowhere/at-all", "--shape"]),
        (["--shape", "hidden_size"], ["--shape", "name=number"]),
        (["--shape", "hidden_size=3"], ["--shape", "intermediate_size"]),
        (["data.train=none.jsonl"], ["data.train", "none.jsonl", "--sequences"]),
        (["--tokens", "20000"], ["--tokens", "20000", "data.max_length=10000"]),
        (["objective.step=plain"], ["objective.step", "step=shared"]),
        (["--results", "none.json"], ["--results", "none.json"]),
    ],
    ids=lambda value: "" if len(value) > 2 else value[0],
)
def test_mistakes_in_plans(arguments, expected, monkeypatch, capsys):
    assert run(monkeypatch, "plan", CONFIGS / "r1_distill_7b.yaml", *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    for text in expected:
        assert text in printed


def test_a_shape_is_read_from_a_directory_or_given(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        read_shape(str(tmp_path), "pair.base")
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["Qwen/QwQ-32B"] | {"vocab_size": 0}))
    with pytest.raises(UserError, match="vocab_size=0"):
        read_shape(str(tmp_path), "pair.base")
    numbers = {k: v for k, v in KNOWN["Qwen/QwQ-32B"].items() if isinstance(v, int)}
    given = ",".join(f"{name}={int(value)}" for name, value in numbers.items())
    plan = ["plan", CONFIGS / "qwq_32b.yaml", "pair.target=x/y", "--shape", given, "--nodes", 8]
    assert run(monkeypatch, *plan) == 0
