"""Files, prompt formats, truncation, masks, padding and data order, against hand-written ids."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from tiny_pair import VOCABULARY, character_tokenizer, conversation_line, corpus_of, encoder, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tca_fast.errors import UserError
from tca_fast.training.batches import check_lengths, collate, make_step_batch
from tca_fast.training.data import Conversation, Encoded, open_corpus

GOOD = conversation_line("1+1?", "<think> two</think>2")


def conversation(prompt="1+1?", response="<think> two</think>2") -> Conversation:
    return Conversation(prompt, response, "math", 7)


def ids_of(text: str) -> list[int]:
    return [VOCABULARY[character] for character in text]


# Files


def test_a_corpus_gives_every_conversation_in_order(tmp_path):
    deep = json.loads("[" * 99 + "]" * 99)
    lines = [conversation_line(f"q{i} \u00e9\uff5c", f"a{i}\nb", difficulty=deep) for i in range(3)]
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
        "line 2: the assistant turn .* holds half of a surrogate pair",
    ),
    "nested too deeply for Python": (b"[" * 100_000, "line 2: nested deeper than 100 levels"),
    "nested too deeply for us": (
        GOOD[:-1].encode() + b', "x": ' + b"[" * 100 + b"]" * 100 + b"}",
        "line 2: nested deeper than 100 levels",
    ),
    "a key twice": (
        GOOD[:-1].encode() + b', "domain": "code"}',
        "line 2: an object has the key 'domain' twice",
    ),
    "a number that is none": (
        GOOD[:-1].encode() + b', "difficulty": NaN}',
        "line 2: not valid JSON .NaN is no JSON number",
    ),
    "a system turn": (
        b'{"conversations": [{"from": "system", "value": "x"}, {"from": "user", "value": "y"}]}',
        r"line 2: the user turn \(conversations\[0\]\) is from 'system', not 'human' or 'user'",
    ),
    "a domain that is no text": (GOOD.replace('"math"', "3").encode(), "line 2: 'domain' is no"),
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


@pytest.mark.parametrize(("format", "mark"), [("deepseek", "<｜User｜>"), ("qwen", "<|im_start|>")])
def test_a_format_that_the_tokenizer_does_not_know_is_refused(format, mark):
    vocabulary = {"<unk>": 0, "hi": 1}
    words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(UserError, match=f"data.format: '{format}' writes {re.escape(mark)}, which"):
        encoder(tokenizer, format=format)
    tokenizer.add_tokens(["<｜User｜>", "<｜Assistant｜>", "<|im_start|>", "<|im_end|>"])
    assert encoder(tokenizer, format=format).encode(conversation("hi", "hi")).ids.count_nonzero()


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

    ids = {"eos_token_id": 1, "pad_token_id": 1, "unk_token_id": None}
    slow = Slow(is_fast=False, chat_template=None, **ids)
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


def test_a_file_that_changes_during_training_is_noticed(tmp_path):
    corpus = corpus_of(tmp_path)
    before = corpus.conversation(2)
    os.utime(tmp_path / "d.jsonl", ns=(0, corpus.stamp[1]))
    assert corpus.conversation(2) == before
    # Still whole conversations, but others.
    corpus_of(tmp_path, 8)
    with pytest.raises(UserError, match="d.jsonl changed during training .it is another file"):
        corpus.conversation(2)
