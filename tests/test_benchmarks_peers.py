"""Peers are compared before they are timed; who is absent or wrong is named."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the suites are outside the package

from benchmarks import peers
from benchmarks.losses import LOSS_CASES
from benchmarks.measure import Machine
from benchmarks.peer_calls import DECODERS, ENCODERS, LOSSES, OURS, Peer
from benchmarks.peers import PEER_CASES
from benchmarks.results import write_results
from tca_fast.results import read_results

FACTS = {"device": "a", "commit": "b", "versions": {}, "dtype": "float32"}
MACHINE = Machine(torch.device("cpu"), torch.float32, 1e9, FACTS)
TOPK, RELU = PEER_CASES["rehearsal"]


def by_name(rows):
    return {row["variant"]: row for row in rows}


def test_what_is_here_is_timed_and_the_rest_is_listed(tmp_path):
    rows = [
        row
        for case in (TOPK, RELU, LOSS_CASES["rehearsal"][0])
        for row in peers.rows_of(case, MACHINE, rounds=1)
    ]
    timed = {(row["operation"], row["variant"]) for row in rows if "absent" not in row}
    for name in (OURS, "dense", "torch embedding_bag"):
        assert ("sparse decode", name) in timed
    assert {("TopK encode", OURS), ("TopK encode", "dense, torch.topk")} <= timed
    assert {("KL", OURS), ("KL", "whole logits")} <= timed
    assert all(row["error"] < 1e-4 for row in rows if "absent" not in row)
    absent = [row for row in rows if "absent" in row]
    assert {row["variant"] for row in absent} >= {"liger fused linear JSD", "FLA fused KL"}
    assert all(row["absent"] for row in absent)
    assert all(peers.line(row) for row in rows)
    write_results(tmp_path / "a.json", rows)
    assert read_results(tmp_path / "a.json") == rows


def test_one_row_for_every_peer():
    found = by_name(peers.decode_rows(RELU, MACHINE, rounds=1))
    assert set(found) == {peer.name for peer in DECODERS}
    assert "equally many" in found["EleutherAI sparsify"]["absent"]
    assert set(by_name(peers.encode_rows(TOPK, MACHINE, 1))) == {peer.name for peer in ENCODERS}
    rows = peers.loss_rows(LOSS_CASES["rehearsal"][0], MACHINE, 1)
    assert set(by_name(rows)) == {peer.name for peer in LOSSES}


def doubled(peer, name):
    """A peer one of whose results is twice what it should be."""

    def call(module, tensors):
        run = peer.call(module, tensors)

        def wrong():
            results = run()
            return {**results, name: 2 * results[name]}

        return wrong

    return replace(peer, call=call)


@pytest.mark.parametrize("name", ["y", "dvalue", "dW_dec"])
def test_a_wrong_peer_is_not_timed(monkeypatch, name):
    ours, dense, bag, sparsify = DECODERS
    monkeypatch.setattr(peers, "DECODERS", [ours, dense, doubled(bag, name), sparsify])
    row = by_name(peers.decode_rows(TOPK, MACHINE, rounds=1))[bag.name]
    assert row["absent"].startswith(f"wrong, not timed: {name} is off by")
    assert "median_ms" not in row


def test_a_peer_that_fails_is_named_with_its_error(monkeypatch):
    def fails(module, tensors):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(peers, "DECODERS", [DECODERS[0], Peer("new", fails)])
    row = by_name(peers.decode_rows(TOPK, MACHINE, rounds=1))["new"]
    assert row["absent"] == "fails: no such kernel"


def test_a_peer_for_cuda_says_so():
    needing = Peer("new", DECODERS[0].call, "torch", needs_cuda=True)
    assert "CUDA" in needing.absence(MACHINE.device, 3)
    assert replace(needing, needs_cuda=False).absence(MACHINE.device, None) is None
