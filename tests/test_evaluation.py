"""Evaluation: figures against hand-written oracles, generation against itself, the page's files."""

import json
import math
import re

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tca_fast.attachment import attach
from tca_fast.config import AdapterConfig
from tca_fast.errors import UserError
from tca_fast.evaluation.faithfulness import Faithfulness, measure_faithfulness
from tca_fast.evaluation.reasoning import (
    Problem,
    Reasoning,
    Response,
    end_of_sequence_ids,
    generate_greedily,
    measure_reasoning,
)
from tca_fast.evaluation.report import (
    MODEL_NAMES,
    ModelResult,
    RunReport,
    results,
    write_report,
)

VOCABULARY = 40


def tiny_model(seed: int, num_layers: int = 3, spread: float = 0.2) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=spread,
    )
    return Qwen2ForCausalLM(config).double().eval()


def sequences(seed: int, lengths: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of each sequence; the second label does not count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[1] = -100
        made.append((ids, labels))
    return made


def padded(rows: list[tuple[Tensor, Tensor]], side: str) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    batch = torch.full((3, len(rows), longest), 0)
    batch[2] = -100
    for row, (ids, labels) in enumerate(rows):
        span = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        batch[0, row, span], batch[1, row, span], batch[2, row, span] = ids, 1, labels
    return batch[0], batch[1], batch[2]


def states_and_logits(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """h_0..h_L of one unpadded sequence without hooks on the path under test."""
    final: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda module, args, out: final.append(args[0]))
    with torch.no_grad():
        output = model(ids[None], output_hidden_states=True)
    handle.remove()
    return [*(h[0] for h in output.hidden_states[:-1]), final[0][0]], output.logits[0]


def by_hand(model: PreTrainedModel, target: PreTrainedModel, rows: list[tuple[Tensor, Tensor]]):
    """KL, agreement and NMSE with loops and torch.distributions, one sequence at a time."""
    kl, agreed, counted, errors, energies, real = 0.0, 0, 0, [0.0] * 4, [0.0] * 4, 0
    for ids, labels in rows:
        states, logits = states_and_logits(model, ids)
        target_states, target_logits = states_and_logits(target, ids)
        for t in range(len(ids) - 1):
            if labels[t + 1] == -100:
                continue
            p = torch.distributions.Categorical(logits=target_logits[t])
            q = torch.distributions.Categorical(logits=logits[t])
            kl += torch.distributions.kl_divergence(p, q).item()
            agreed += int(p.probs.argmax() == q.probs.argmax())
            counted += 1
        real += len(ids)
        for i, (h, h_target) in enumerate(zip(states, target_states, strict=True)):
            for t in range(len(ids)):
                errors[i] += sum(x * x for x in (h[t] - h_target[t]).tolist())
                energies[i] += sum(x * x for x in h_target[t].tolist())
    elements = 24 * real
    nmse = [(e / elements) / (n / elements + 1e-8) for e, n in zip(errors, energies, strict=True)]
    return kl / counted, agreed / counted, nmse, counted, real


@pytest.mark.parametrize("side", ["right", "left"])
def test_faithfulness_equals_loops_over_single_sequences(side: str) -> None:
    model, target = tiny_model(0), tiny_model(1)
    rows = sequences(2, (7, 11, 4, 9, 2))
    kl, agreement, nmse, counted, real = by_hand(model, target, rows)
    batches = [padded(rows[:2], side), padded(rows[2:], side)]
    measured = measure_faithfulness(model, target, batches)
    assert measured.kl == pytest.approx(kl, rel=1e-9)
    assert measured.agreement == pytest.approx(agreement)
    assert measured.nmse == pytest.approx(nmse, rel=1e-9)
    assert (measured.num_counted, measured.num_real) == (counted, real)
    assert measured.l0 is None


def test_a_model_is_perfectly_faithful_to_itself() -> None:
    model = tiny_model(0)
    measured = measure_faithfulness(model, model, [padded(sequences(1, (6, 8)), "right")])
    assert measured.kl == pytest.approx(0, abs=1e-12)
    assert measured.agreement == 1
    assert measured.nmse == (0, 0, 0, 0)


def test_l0_counts_active_features_of_real_tokens_only() -> None:
    model, target = tiny_model(0), tiny_model(1)
    adapted = attach(model, AdapterConfig(num_features=50), dtype=torch.float64)
    rows = sequences(3, (5, 9))
    active = torch.zeros(3, dtype=torch.float64)
    inputs: list[Tensor] = []
    handles = [
        wrapped.mlp.register_forward_hook(lambda module, args, out: inputs.append(args[0][0]))
        for wrapped in adapted.wrapped
    ]
    for ids, _ in rows:
        inputs.clear()
        states_and_logits(model, ids)
        for layer, x in enumerate(inputs):
            adapter = adapted.layers[layer]
            active[layer] += (x @ adapter.W_enc.T + adapter.b_enc > 0).sum()
    for handle in handles:
        handle.remove()
    measured = measure_faithfulness(model, target, [padded(rows, "left")])
    assert measured.l0 == pytest.approx((active / 14).tolist())
    assert measured.mean_l0 == pytest.approx(active.mean().item() / 14)
    with adapted.disabled():
        assert measure_faithfulness(model, target, [padded(rows, "left")]).l0 is None


def test_faithfulness_refuses_data_without_counted_tokens() -> None:
    model = tiny_model(0)
    with pytest.raises(UserError, match="0 counted tokens"):
        measure_faithfulness(model, model, [])


def test_faithfulness_refuses_models_of_different_depth() -> None:
    with pytest.raises(UserError, match=r"\(2, 24, 40\), target \(3, 24, 40\)"):
        measure_faithfulness(
            tiny_model(0, num_layers=2), tiny_model(0), [padded(sequences(1, (6,)), "right")]
        )


def test_faithfulness_refuses_models_of_different_vocabulary() -> None:
    target = tiny_model(0)
    target.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(UserError, match=r"vocabulary\) \(3, 24, 40\), target \(3, 24, 43\)"):
        measure_faithfulness(tiny_model(0), target, [padded(sequences(1, (6,)), "right")])


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_of_padding_do_not_count(side: str) -> None:
    model, target = tiny_model(0), tiny_model(1)
    ids, mask, labels = padded(sequences(2, (7, 3)), side)
    careless = torch.where(mask.bool(), labels, ids)
    expected = measure_faithfulness(model, target, [(ids, mask, labels)])
    assert measure_faithfulness(model, target, [(ids, mask, careless)]) == expected


def model_with_dropout(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
    rates = {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4}
    config = GPT2Config(vocab_size=VOCABULARY, initializer_range=0.4, **shape, **rates)
    return GPT2LMHeadModel(config).double()


def test_dropout_is_off_while_a_model_is_measured_and_its_modes_come_back() -> None:
    model = model_with_dropout(0).eval()
    expected = generate_greedily(model, PROMPTS, eos_ids=EOS, max_new_tokens=25)
    model.train()
    model.transformer.h[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert generate_greedily(model, PROMPTS, eos_ids=EOS, max_new_tokens=25) == expected
    batch = padded(sequences(2, (7, 3)), "right")
    assert measure_faithfulness(model, model, [batch]).kl == pytest.approx(0, abs=1e-12)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_an_adapted_model_is_measured_as_the_model_it_holds() -> None:
    target, batch = tiny_model(1), padded(sequences(2, (7, 3)), "right")
    adapted = attach(tiny_model(0), AdapterConfig(num_features=50), dtype=torch.float64)
    expected = measure_faithfulness(adapted.model, target, [batch])
    assert measure_faithfulness(adapted, target, [batch]) == expected
    options = {"eos_ids": EOS, "max_new_tokens": 5}
    assert generate_greedily(adapted, PROMPTS, **options) == generate_greedily(
        adapted.model, PROMPTS, **options
    )


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [3, 3], [20, 1]]
EOS = {7, 12, 13, 14, 15}


def test_batched_greedy_decoding_equals_one_by_one_and_transformers() -> None:
    model = tiny_model(0)
    together = generate_greedily(model, PROMPTS, eos_ids=EOS, max_new_tokens=25)
    alone = [
        generate_greedily(model, [prompt], eos_ids=EOS, max_new_tokens=25)[0] for prompt in PROMPTS
    ]
    theirs = [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=25,
            eos_token_id=sorted(EOS),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    assert together == alone == theirs
    assert len({len(ids) for ids in together}) > 1, "the case needs responses of unequal length"


class DigitTokenizer:
    """Writes token i as the word i; token 0 ends a response."""

    eos_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(token) for token in ids if token != 0)


def test_reasoning_counts_what_the_responses_show() -> None:
    model = tiny_model(4)
    model.generation_config.eos_token_id = [7, 12]
    eos = {0, 7, 12}
    raw = generate_greedily(model, PROMPTS, eos_ids=eos, max_new_tokens=8)
    texts = [DigitTokenizer().decode(ids, True) for ids in raw]
    problems = [
        Problem(prompt, texts[i] if i in (0, 3) else "never") for i, prompt in enumerate(PROMPTS)
    ]
    ticks: list[int] = []
    measured = measure_reasoning(
        model,
        DigitTokenizer(),
        problems,
        check=lambda answer, response: answer == response,
        count_waits=lambda response: len(response.split()),
        max_new_tokens=8,
        batch_size=2,
        progress=ticks.append,
    )
    lengths = [len(ids) - (ids[-1] in eos) for ids in raw]
    assert [response.text for response in measured.responses] == texts
    assert [response.num_tokens for response in measured.responses] == lengths
    right = sum(text == problem.answer for text, problem in zip(texts, problems, strict=True))
    p = right / 5
    assert measured.accuracy == p
    assert measured.accuracy_se == pytest.approx(math.sqrt(p * (1 - p) / 5))
    expected = torch.tensor(lengths, dtype=torch.float64)
    assert measured.mean_length == pytest.approx(expected.mean().item())
    assert measured.mean_length_se == pytest.approx(expected.std().item() / math.sqrt(5))
    assert measured.truncated_share == sum(ids[-1] not in eos for ids in raw) / 5
    assert sum(ticks) == 5


def test_reasoning_refuses_what_it_cannot_run() -> None:
    model = tiny_model(0)
    model.generation_config.eos_token_id = None
    nothing = type("Tokenizer", (), {"eos_token_id": None})()
    with pytest.raises(UserError, match="eos_token_id"):
        end_of_sequence_ids(model, nothing)
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        generate_greedily(model, [[1], []], eos_ids=EOS, max_new_tokens=3)
    with pytest.raises(UserError, match="max_new_tokens: 0"):
        generate_greedily(model, [[1]], eos_ids=EOS, max_new_tokens=0)
    with pytest.raises(UserError, match="problems: none"):
        measure_reasoning(
            model,
            DigitTokenizer(),
            [],
            check=str.__eq__,
            count_waits=len,
            max_new_tokens=3,
        )
    with pytest.raises(UserError, match="batch_size: 0 problems"):
        measure_reasoning(
            model,
            DigitTokenizer(),
            [Problem([1], "1")],
            check=str.__eq__,
            count_waits=len,
            max_new_tokens=3,
            batch_size=0,
        )


def reasoning(correct: list[bool], length: int) -> Reasoning:
    return Reasoning(
        tuple(
            Response("<think>\n1&2 wait\n</think>\nanswer 3", length, False, right, 1)
            for right in correct
        )
    )


def sample_report() -> RunReport:
    solved = {"base": 1, "hybrid": 0, "adapter": 7, "target": 9}
    models = tuple(
        ModelResult(
            name,
            Faithfulness(
                kl=index / 7,
                lm_loss=1.5,
                agreement=0.9,
                nmse=(0.0, 0.01, 0.02) if name != "target" else (0.0, 0.0, 0.0),
                l0=(4.0, 6.0) if name == "adapter" else None,
                num_counted=1234,
                num_real=1300,
            ),
            reasoning([i < solved[name] for i in range(10)], 20 + index),
        )
        for index, name in enumerate(MODEL_NAMES)
    )
    return RunReport(
        title="A run",
        models=models,
        num_features=500,
        prompts=[f"<b>{i}</b>" for i in range(10)],
        answers=["3"] * 10,
        samples=(0, 8),
        samples_note="Two & no more.",
        history=[
            {"step": s, "split": split, "kl": 1 / s, "nmse": 0.5 / s, "l0": 200 / s}
            for s in range(1, 40)
            for split in (("train", "validation") if s % 10 == 0 else ("train",))
        ],
        config={"adapter": {"num_features": 500}},
        environment={"torch": "2.13"},
        seconds={"training": 12.3},
    )


def test_summary_figures() -> None:
    report = sample_report()
    assert report.accuracy_recovered == pytest.approx((0.7 - 0.1) / (0.9 - 0.1))
    assert report.active_share == pytest.approx(5 / 500)
    assert report.length_ratio == pytest.approx(22 / 23)
    # Delta method with the covariances of the paired outcomes: an oracle without resampling.
    correct = torch.tensor(
        [
            [r.correct for r in report.model(name).reasoning.responses]
            for name in ("base", "adapter", "target")
        ],
        dtype=torch.float64,
    )
    gain, recovered = 0.8, report.accuracy_recovered
    gradient = torch.tensor([recovered - 1, 1.0, -recovered], dtype=torch.float64) / gain
    variance = gradient @ torch.cov(correct, correction=0) @ gradient / 10
    assert report.accuracy_recovered_se() == pytest.approx(variance.sqrt().item(), rel=0.25)


def test_recovered_is_undefined_without_a_gain() -> None:
    report = sample_report()
    same = tuple(
        ModelResult(model.name, model.faithfulness, reasoning([True] * 10, 5))
        for model in report.models
    )
    flat = RunReport("flat", same, 500, report.prompts, report.answers)
    assert math.isnan(flat.accuracy_recovered)
    assert results(flat)["accuracy_recovered"] is None


def test_report_files_are_whole_and_load_nothing_from_outside(tmp_path) -> None:
    report = sample_report()
    paths = write_report(report, tmp_path / "new" / "run")
    assert set(paths) == {"report.html", "results.json", "figure.png", "figure.svg"}
    assert json.loads(paths["results.json"].read_text()) == results(report)
    assert paths["figure.png"].read_bytes().startswith(b"\x89PNG")
    page = paths["report.html"].read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    assert "http" not in page and "<script" not in page and "@import" not in page
    assert "<b>0</b>" not in page and "&lt;b&gt;0&lt;/b&gt;" in page
    assert "1&amp;2 wait" in page and "Two &amp; no more." in page
    assert page.count("<svg") == page.count("</svg>") == 6
    for figure in ("75.0 %", "1.00 %", "0.96 ×", "1,234"):
        assert figure in page


def test_an_unwritable_directory_is_a_user_error(tmp_path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(UserError, match="file.*cannot be written.*directory, not a file"):
        write_report(sample_report(), tmp_path / "file")


def test_a_full_disk_leaves_the_previous_report(tmp_path, monkeypatch) -> None:
    write_report(sample_report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(sample_report(), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
