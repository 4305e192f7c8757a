"""The miniature: its task is sound, its assets load, the base is poor at the task and the target
is good.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tca_fast import miniature
from tca_fast.miniature.evaluate import respond
from tca_fast.miniature.task import DOMAINS, count_waits, is_correct, make_problems

MEBIBYTE = 2**20
DIGIT_STEP = re.compile(r"(\d)(<(\d))?([-+*]\d)?")


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return read_records(miniature.train_data())


@pytest.fixture(scope="module")
def val() -> list[dict[str, Any]]:
    return read_records(miniature.val_data())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(miniature.base_path())


def test_problems_repeat_with_the_seed_and_avoid_the_excluded() -> None:
    first = make_problems(50, seed=7)
    assert first == make_problems(50, seed=7)
    prompts = frozenset(p.prompt for p in first)
    assert len(prompts) == 50
    assert not prompts & {p.prompt for p in make_problems(50, seed=7, exclude=prompts)}


def test_styles_state_their_answers_and_only_reasoning_hesitates() -> None:
    problems = make_problems(300, seed=8)
    for problem in problems:
        slips = sum(step.slip is not None for step in problem.steps)
        assert is_correct(problem.answer, problem.response("direct"))
        assert is_correct(problem.answer, problem.response("reasoning"))
        assert is_correct(problem.careless_answer, problem.response("careless"))
        assert count_waits(problem.response("reasoning")) == slips
        assert (
            count_waits(problem.response("careless"))
            == count_waits(problem.response("direct"))
            == 0
        )
        if not slips:
            assert problem.response("careless") == problem.response("reasoning")
    assert {p.domain for p in problems} == set(DOMAINS)


def test_steps_are_true_and_chained() -> None:
    """Each digit step is recomputed from its text; each begins with the value the last one left."""
    for problem in make_problems(300, seed=9):
        value = None
        for step in problem.steps:
            left, _, result = step.text.partition(":")[2].strip().rpartition("=")
            if value is not None:
                assert re.split(r"[^a-z0-9]", left)[0] == value
            value = result.strip()
            if problem.domain != "science":
                parts = DIGIT_STEP.fullmatch(left)
                assert parts is not None
                start, condition, bound, action = parts.groups()
                assert not condition or (int(start) < int(bound)) == bool(action)
                assert eval(f"({start}{action or ''}) % 10") == int(result)
        assert value == problem.answer


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        pytest.param("answer=7", True, id="direct"),
        pytest.param("<think>\na:3+4=7\n</think>\nanswer=7", True, id="worked"),
        pytest.param("answer= 7\n", True, id="surrounding space"),
        pytest.param("answer=8", False, id="wrong digit"),
        pytest.param("answer=77", False, id="two digits"),
        pytest.param("7", False, id="not stated as an answer"),
        pytest.param("answer=7 answer=8", False, id="two answers"),
        pytest.param(
            "<think>\nanswer=7\n</think>\nanswer=8", False, id="right in thought, wrong after it"
        ),
        pytest.param("<think>\na:3+4=7\nanswer=7", False, id="unfinished thought"),
        pytest.param("<think>\na:3+4=7\n</think>\n", False, id="nothing after the thought"),
        pytest.param("", False, id="empty"),
    ],
)
def test_is_correct(response: str, expected: bool) -> None:
    assert is_correct("7", response) is expected


def test_count_waits_counts_words() -> None:
    assert count_waits("a:1+2=3 wait\na:1*2=2\nwaiter wait") == 2


def test_assets_are_small() -> None:
    assert sum(f.stat().st_size for f in miniature.ASSETS.rglob("*") if f.is_file()) < 8 * MEBIBYTE


def test_a_missing_asset_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(miniature, "ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"base is missing; make it with: python -m"):
        miniature.base_path()


def test_data_is_well_formed(train: list[dict[str, Any]], val: list[dict[str, Any]]) -> None:
    assert len(train) >= 2000
    assert len(val) >= 200
    for record in train + val:
        human, gpt = record["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert gpt["value"].startswith("<think>\n")
        assert gpt["value"].count("</think>") == 1
        assert is_correct(record["answer"], gpt["value"])
        assert record["domain"] in DOMAINS
        assert (record["source"], record["needs_truncation"]) == ("miniature", False)
        assert isinstance(record["difficulty"], int)


def test_train_and_val_share_no_prompt(
    train: list[dict[str, Any]], val: list[dict[str, Any]]
) -> None:
    prompts = [record["conversations"][0]["value"] for record in train + val]
    assert len(set(prompts)) == len(prompts)


def test_tokenizer_gives_the_text_back(tokenizer: Any, val: list[dict[str, Any]]) -> None:
    for record in val:
        prompt, response = (turn["value"] for turn in record["conversations"])
        text = f"<｜User｜>{prompt}<｜Assistant｜>{response}"
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[1:]) == text


def test_turn_thought_and_wait_tokens_are_single(tokenizer: Any) -> None:
    for piece in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", " wait"):
        assert len(tokenizer(piece, add_special_tokens=False)["input_ids"]) == 1
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_the_pair_shares_tokenizer_and_configuration(tokenizer: Any) -> None:
    models = [
        AutoModelForCausalLM.from_pretrained(p)
        for p in (miniature.base_path(), miniature.target_path())
    ]
    base, target = (model.config.to_dict() for model in models)
    ignored = {"_name_or_path"}
    assert {k: v for k, v in base.items() if k not in ignored} == {
        k: v for k, v in target.items() if k not in ignored
    }
    assert base["tie_word_embeddings"] is False
    assert base["vocab_size"] == len(tokenizer)
    assert (
        AutoTokenizer.from_pretrained(miniature.target_path()).get_vocab() == tokenizer.get_vocab()
    )


def test_base_is_poor_and_target_is_good_and_longer_winded(
    tokenizer: Any, val: list[dict[str, Any]]
) -> None:
    records = val[:60]
    prompts = [record["conversations"][0]["value"] for record in records]
    right, length, waits = {}, {}, {}
    for name, path in (("base", miniature.base_path()), ("target", miniature.target_path())):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        responses = respond(model, tokenizer, prompts)
        right[name] = sum(
            is_correct(r["answer"], text) for r, (text, _) in zip(records, responses, strict=True)
        )
        length[name] = sum(tokens for _, tokens in responses)
        waits[name] = sum(count_waits(text) for text, _ in responses)
    assert right["base"] <= 24
    assert right["target"] >= 54
    assert length["target"] > 5 * length["base"]
    assert waits["base"] == 0 < waits["target"]
