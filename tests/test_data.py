"""Files, prompt formats, truncation, masks, padding and data order, against hand-written ids."""

import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import VOCABULARY, character_tokenizer, conversation_line
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tca_fast.config import DataConfig, RunConfig
from tca_fast.errors import UserError
from tca_fast.training.batches import (
    BatchPlan,
    check_lengths,
    collate,
    deal,
    make_step_batch,
    step_batches,
)
from tca_fast.training.data import Conversation, Encoded, Encoder, open_corpus

GOOD = conversation_line("1+1?", "<think> two</think>2")


def settings(**changes) -> DataConfig:
    return DataConfig(train="unused.jsonl", **{"max_length": 1000, **changes})


def encoder(tokenizer=None, **changes) -> Encoder:
    return Encoder(tokenizer or character_tokenizer(), settings(**changes))


def conversation(prompt="1+1?", response="<think> two</think>2") -> Conversation:
    return Conversation(prompt, response, "math", 7)


def ids_of(text: str) -> list[int]:
    return [VOCABULARY[character] for character in text]


def write(path, *lines: bytes | str):
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    )
    return str(path)


# Files


def test_a_corpus_gives_every_conversation_in_order(tmp_path):
    lines = [conversation_line(f"q{i} \u00e9\uff5c", f"a{i}\nb", difficulty=3) for i in range(3)]
    path = write(tmp_path / "d.jsonl", "\ufeff" + lines[0], "", lines[1] + "\r", lines[2])
    corpus = open_corpus(path, "data.train")
    assert len(corpus) == 3 and corpus.line_numbers == [1, 3, 4]
    expected = [
        Conversation(f"q{i} \u00e9\uff5c", f"a{i}\nb", "math", n) for i, n in enumerate((1, 3, 4))
    ]
    assert [corpus.conversation(i) for i in range(3)] == expected


BAD_LINES = {
    "not JSON": (b'{"conversations": [', "line 2: not valid JSON"),
    "not UTF-8": (b'{"conversations": "\xff"}', "line 2: not UTF-8 .byte 0xff at 19"),
    "UTF-16": (GOOD.encode("utf-16"), "line 2: not UTF-8"),
    "not an object": (b"[1]", "line 2: holds a JSON list"),
    "no conversations": (b'{"problem": "x"}', "line 2: 'conversations' is not a list"),
    "one turn": (b'{"conversations": [{"value": "x"}]}', "line 2: 'conversations' is not a list"),
    "turn without text": (
        b'{"conversations": [{"value": "x"}, {"content": "y"}]}',
        r"line 2: the assistant turn \(conversations\[1\]\) has no text",
    ),
    "number for text": (
        b'{"conversations": [{"value": 3}, {"value": "y"}]}',
        r"line 2: the user turn",
    ),
    "empty response": (
        b'{"conversations": [{"value": "x"}, {"value": ""}]}',
        "line 2: the assistant turn",
    ),
    "half a surrogate pair": (
        b'{"conversations": [{"value": "x"}, {"value": "\\ud800"}]}',
        "line 2: the assistant turn holds half of a surrogate pair",
    ),
    "nested too deeply": (b"[" * 100_000, "line 2: not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, case):
    line, message = BAD_LINES[case]
    line = line.replace(b"\n", b"")
    path = write(tmp_path / "d.jsonl", GOOD, line, GOOD)
    with pytest.raises(UserError, match=message) as caught:
        open_corpus(path, "data.train")
    text = str(caught.value)
    assert text.startswith(f"data.train: {path}") and "\n" not in text
    assert "data.bad_lines=skip" in text
    corpus = open_corpus(path, "data.train", "skip")
    assert len(corpus) == 2 and corpus.num_skipped == 1 and "line 2" in corpus.first_skipped
    assert corpus.conversation(1).line_number == 3


def test_files_without_a_conversation_are_refused(tmp_path):
    empty = write(tmp_path / "empty.jsonl")
    blank = write(tmp_path / "blank.jsonl", "", "  ")
    (tmp_path / "none.jsonl").write_bytes(b"")
    useless = write(tmp_path / "useless.jsonl", "{}", "[]")
    for path, mode, message in (
        (empty, "error", "holds no conversation, it is empty"),
        (blank, "skip", "it is empty"),
        (str(tmp_path / "none.jsonl"), "error", "it is empty"),
        (useless, "skip", "none of its 2 lines is usable .first: .* line 1"),
        (str(tmp_path / "nowhere.jsonl"), "error", "nowhere.jsonl does not exist"),
        (str(tmp_path), "error", "is a directory"),
        ("hf://org/repository", "error", "is not of the form hf://"),
    ):
        with pytest.raises(UserError, match=message):
            open_corpus(path, "data.validation", mode)


def test_hub_files_are_downloaded_as_dataset_files(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, name, *, repo_type, revision):
        asked.append((repository, name, repo_type, revision))
        if name == "missing.jsonl":
            raise OSError("404\nnot there")
        return write(tmp_path / "d.jsonl", GOOD)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(open_corpus("hf://org/set/data/train.jsonl", "data.train")) == 1
    open_corpus("hf://org/set/train.jsonl@v2", "data.train")
    assert asked == [
        ("org/set", "data/train.jsonl", "dataset", None),
        ("org/set", "train.jsonl", "dataset", "v2"),
    ]
    with pytest.raises(UserError, match="cannot be fetched .OSError: 404 not there"):
        open_corpus("hf://org/set/missing.jsonl", "data.train")


# Formats


def test_the_deepseek_format():
    text = "<\uff5cUser\uff5c>1+1?<\uff5cAssistant\uff5c><think>\ntwo</think>2"
    prompt = "<\uff5cUser\uff5c>1+1?<\uff5cAssistant\uff5c>"
    assert encoder().render(conversation()) == (text, len(prompt))
    encoded = encoder().encode(conversation())
    assert encoded.ids.tolist() == [VOCABULARY["<bos>"], *ids_of(text)]
    assert encoded.prompt_length == 1 + len(prompt)


def test_the_qwen_format():
    prompt = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    text = prompt + "<think>\ntwo</think>2<|im_end|>\n"
    assert encoder(format="qwen").render(conversation()) == (text, len(prompt))
    assert encoder(format="qwen").encode(conversation()).prompt_length == 1 + len(prompt)


def test_only_one_space_after_the_opening_tag_becomes_a_newline():
    responses = {"<think> a": "<think>\na", "<think>  a": "<think>\n a", "<think>\na": "<think>\na"}
    responses["x<think> a"] = "x<think> a"
    for response, expected in responses.items():
        text, boundary = encoder().render(conversation(response=response))
        assert text[boundary:] == expected


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ CONTENT }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)


def test_the_chat_format_has_one_bos_and_knows_where_the_response_starts():
    tokenizer = character_tokenizer(chat_template=TEMPLATE.replace("CONTENT", "m.content"))
    encoded = encoder(tokenizer, format="chat").encode(conversation("hi", "<think>so</think>yes"))
    assert encoded.ids.tolist() == [0, *ids_of("[user]hi[assistant]<think>so</think>yes")]
    assert encoded.prompt_length == 1 + len("[user]hi[assistant]")


def test_a_template_that_moves_white_space_is_understood():
    squeezed = TEMPLATE.replace("CONTENT", "m.content | replace('\\n\\n', '\\n')")
    tokenizer = character_tokenizer(chat_template=squeezed)
    encoded = encoder(tokenizer, format="chat").encode(conversation("hi", "so\n\nyes"))
    assert encoded.ids.tolist() == [0, *ids_of("[user]hi[assistant]so\nyes")]
    assert encoded.prompt_length == 1 + len("[user]hi[assistant]")


def test_a_template_that_drops_the_thinking_is_refused():
    dropping = TEMPLATE.replace("CONTENT", "m.content.split('</think>')[-1]")
    tokenizer = character_tokenizer(chat_template=dropping)
    with pytest.raises(
        UserError, match="data.format: 'chat'.*drops part of the response in line 7"
    ):
        encoder(tokenizer, format="chat").encode(conversation("hi", "<think>so</think>yes"))
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        encoder(format="chat")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Joins two newlines into one token, also across the end of the prompt."""
    vocabulary = {**VOCABULARY, "\n\n": len(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\n", "\n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("never there", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_a_token_astride_the_boundary_counts_as_prompt():
    encoded = encoder(merging_tokenizer(), format="qwen").encode(conversation("q", "\nyes"))
    prompt = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    double = len(VOCABULARY)
    assert encoded.ids.tolist() == [*ids_of(prompt[:-1]), double, *ids_of("yes<|im_end|>\n")]
    assert encoded.prompt_length == len(prompt)


def test_tokenizers_without_offsets_compare_prefixes():
    def tokenize(text, add_special_tokens, verbose):
        return {"input_ids": [0, *ids_of(text), 1]}  # one that ends everything with EOS

    class Slow(SimpleNamespace):
        def __call__(self, *arguments, **options):
            return tokenize(*arguments, **options)

    slow = Slow(is_fast=False, eos_token_id=1, pad_token_id=1, chat_template=None)
    encoded = encoder(slow).encode(conversation("q", "a"))
    assert encoded.prompt_length == 1 + len("<\uff5cUser\uff5c>q<\uff5cAssistant\uff5c>")


# Truncation, end of sequence, collation


def test_truncation_keeps_the_first_tokens():
    whole = encoder().encode(conversation())
    cut = encoder(max_length=12).encode(conversation())
    assert cut.ids.tolist() == whole.ids[:12].tolist()
    assert cut.original_length == len(whole.ids) and cut.prompt_length == 12


def test_too_long_with_truncation_off_names_line_length_and_limit(tmp_path):
    length = len(encoder().encode(conversation()).ids)
    strict = encoder(truncate=False, max_length=length)
    assert len(strict.encode(conversation()).ids) == length
    path = write(tmp_path / "d.jsonl", GOOD, conversation_line("1+1?", "<think> twoo</think>2"))
    message = f"line 2 has {length + 1} tokens, more than data.max_length={length}; raise"
    with pytest.raises(UserError, match=message):
        check_lengths(open_corpus(path, "data.train"), strict, {})


def test_append_eos_ends_a_whole_response_once():
    plain = encoder().encode(conversation()).ids.tolist()
    assert encoder(append_eos=True).encode(conversation()).ids.tolist() == [*plain, 1]
    cut = encoder(append_eos=True, max_length=9).encode(conversation()).ids.tolist()
    assert cut == plain[:9]
    ended = conversation(response="yes<eos>")
    assert encoder(append_eos=True).encode(ended).ids.tolist().count(1) == 1


def test_labels_and_ids_are_padded_on_the_right():
    sequences = [
        Encoded(torch.tensor([5, 6, 7, 8], dtype=torch.int32), 2, 4, 1),
        Encoded(torch.tensor([5, 9], dtype=torch.int32), 1, 2, 2),
    ]
    masked = collate(sequences, 3, loss_on_prompt=False)
    assert masked.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 3, 3]]
    assert masked.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert masked.labels.tolist() == [[-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert (masked.label_tokens, masked.real_tokens) == (3, 6)
    everything = collate(sequences, 3, loss_on_prompt=True)
    assert everything.labels.tolist() == [[5, 6, 7, 8], [5, 9, -100, -100]]
    # The first token of a row is nobody's next token.
    assert everything.label_tokens == 4
    stand_in = everything._replace(weight=0.0)
    assert (stand_in.label_tokens, stand_in.real_tokens) == (0, 0)


def test_an_id_outside_the_embedding_is_refused(tmp_path):
    corpus = open_corpus(write(tmp_path / "d.jsonl", GOOD), "data.train")
    narrow = encoder()
    narrow.vocab_size = VOCABULARY["\uff5c"]
    with pytest.raises(UserError, match="pair.target: its tokenizer gives id .* near line 1"):
        make_step_batch(corpus, narrow, [([0], 1.0)])


# Order


def plan(num_sequences=23, batch=4, micro=2, seed=3) -> BatchPlan:
    return BatchPlan(num_sequences, batch, micro, seed)


@given(
    num_sequences=st.integers(1, 60),
    micro=st.integers(1, 4),
    num_ranks=st.integers(1, 5),
    factor=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_every_sequence_once_per_epoch_at_any_number_of_ranks(
    num_sequences, micro, num_ranks, factor, seed
):
    ours = BatchPlan(num_sequences, micro * num_ranks * factor, micro, seed)
    alone = BatchPlan(num_sequences, micro * num_ranks * factor, micro, seed)
    for epoch in range(2):
        seen = []
        for step in range(epoch * ours.steps_per_epoch, (epoch + 1) * ours.steps_per_epoch):
            shares = [ours.micro_batches(step, rank, num_ranks) for rank in range(num_ranks)]
            assert len({len(share) for share in shares}) == 1
            real = [tuple(ids) for share in shares for ids, weight in share if weight]
            everything = [tuple(ids) for ids, _ in alone.micro_batches(step, 0, 1)]
            assert sorted(real) == sorted(everything)
            seen += [index for micro_batch in real for index in micro_batch]
        assert sorted(seen) == list(range(num_sequences))


def test_the_last_batch_of_an_epoch_is_a_step_of_its_own():
    assert plan().steps_per_epoch == 6
    assert [len(plan().sequences(step)) for step in range(7)] == [4, 4, 4, 4, 4, 3, 4]
    assert plan().total_steps(3, None) == 18 and plan().total_steps(3, 10) == 10
    assert plan(num_sequences=3).steps_per_epoch == 1


def test_order_depends_on_seed_and_epoch_alone():
    first = plan().order(0).tolist()
    assert plan().order(0).tolist() == first
    assert plan().order(1).tolist() != first and plan(seed=4).order(0).tolist() != first
    state = torch.get_rng_state()
    plan().order(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_without_a_micro_batch_stands_in():
    assert deal([4, 5], 2, 0, 2) == [([4, 5], 1.0)]
    assert deal([4, 5], 2, 1, 2) == [([4, 5], 0.0)]
    assert deal([1, 2, 3], 1, 1, 2) == [([2], 1.0), ([1], 0.0)]


def test_an_indivisible_batch_is_refused():
    run = RunConfig(output_dir="x", train_batch_size=6, per_device_train_batch_size=2)
    assert BatchPlan.from_config(run, 10, 3).train_batch_size == 6
    with pytest.raises(UserError, match="run.train_batch_size: 6 .* times 2 rank.* multiple of 4"):
        BatchPlan.from_config(run, 10, 2)


def corpus_of(tmp_path, count=9):
    lines = [conversation_line(f"{i}?", "so " * i + "!") for i in range(count)]
    return open_corpus(write(tmp_path / "d.jsonl", *lines), "data.train")


def test_worker_processes_give_the_same_batches(tmp_path):
    corpus = corpus_of(tmp_path)
    steps, ours = range(2, 7), plan(num_sequences=9)
    cache: dict = {}
    here = list(step_batches(corpus, encoder(), ours, steps, cache=cache))
    there = list(step_batches(corpus, encoder(num_workers=2), ours, steps))
    assert len(here) == len(there) == 5 and len(cache) == 9
    for one, other in zip(here, there, strict=True):
        assert one[1:] == other[1:]
        for ours_, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours_[:3], theirs[:3], strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_while_tokenizing_arrives_as_one_line(tmp_path, num_workers):
    strict = encoder(truncate=False, max_length=40, num_workers=num_workers)
    batches = step_batches(corpus_of(tmp_path), strict, plan(num_sequences=9), range(3))
    errors = [batch.error for batch in batches]
    assert any(errors)
    assert all("\n" not in error for error in errors)


def test_a_file_that_changes_during_training_is_noticed(tmp_path):
    corpus = corpus_of(tmp_path)
    before = corpus.conversation(2)
    os.utime(tmp_path / "d.jsonl", ns=(0, corpus.stamp[1]))
    assert corpus.conversation(2) == before
    # Still whole conversations, but others.
    corpus_of(tmp_path, 8)
    with pytest.raises(UserError, match="d.jsonl changed during training .it is another file"):
        corpus.conversation(2)
