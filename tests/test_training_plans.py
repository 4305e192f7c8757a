"""Which sequences make which step, padded or packed, at any number of ranks."""

import math
import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import corpus_of, encoder

from tca_fast.config import RunConfig
from tca_fast.errors import UserError
from tca_fast.training.batches import pack_row
from tca_fast.training.pipeline import ahead, step_batches
from tca_fast.training.plans import BatchPlan, PackedPlan, deal, pack


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
    assert deal([[4, 5]], 0, 2) == [([4, 5], 1.0)]
    assert deal([[4, 5]], 1, 2) == [([4, 5], 0.0)]
    assert deal([[1], [2], [3]], 1, 2) == [([2], 1.0), ([3], 0.0)]


def test_an_indivisible_batch_is_refused():
    run = RunConfig(output_dir="x", train_batch_size=6, per_device_train_batch_size=2)
    assert BatchPlan.from_config(run, 10, 3).train_batch_size == 6
    with pytest.raises(UserError, match="run.train_batch_size: 6 .* times 2 rank.* multiple of 4"):
        BatchPlan.from_config(run, 10, 2)


# Packed


def traces(median: float, spread: float, count: int = 20_000, seed: int = 0) -> list[int]:
    """Lengths of reasoning traces: log-normal, cut off at 10,000 tokens."""
    draw = random.Random(seed)
    lengths = (draw.lognormvariate(math.log(median), spread) for _ in range(count))
    return [min(10_000, max(30, round(length))) for length in lengths]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    num_ranks=st.integers(1, 4),
    factor=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_packed_steps_are_the_same_at_any_number_of_ranks(lengths, num_ranks, factor, seed):
    ours, alone = (PackedPlan(lengths, 50, num_ranks * factor, seed) for _ in range(2))
    first = [ours.groups(step) for step in range(ours.steps_per_epoch)]
    for epoch in range(2):
        seen = []
        for step in range(epoch * ours.steps_per_epoch, (epoch + 1) * ours.steps_per_epoch):
            shares = [ours.micro_batches(step, rank, num_ranks) for rank in range(num_ranks)]
            assert len({len(share) for share in shares}) == 1
            real = [tuple(row) for share in shares for row, weight in share if weight]
            assert sorted(real) == sorted(tuple(row) for row, _ in alone.micro_batches(step, 0, 1))
            assert all(sum(lengths[index] for index in row) <= 50 for row in real)
            seen += [index for row in real for index in row]
        assert sorted(seen) == list(range(len(lengths)))
    # Going back, as a resumed run does, changes nothing.
    assert [ours.groups(step) for step in range(ours.steps_per_epoch)] == first


def test_packed_order_depends_on_seed_and_epoch_alone():
    lengths = traces(3000, 0.8, 400)
    one = PackedPlan(lengths, 10_000, 4, seed=1)
    steps = one.steps_per_epoch
    assert [one.groups(step) for step in range(steps)] == [
        PackedPlan(lengths, 10_000, 4, seed=1).groups(step) for step in range(steps)
    ]
    assert one.groups(0) != one.groups(steps)
    assert one.groups(0) != PackedPlan(lengths, 10_000, 4, seed=2).groups(0)
    assert [len(one.groups(step)) for step in range(steps - 1)] == [4] * (steps - 1)


# Median and spread of the logarithm.
MIXES = [(2000, 1.0), (3000, 0.8), (4500, 0.7), (6000, 0.7), (6000, 0.5), (8000, 0.6)]
# Rows of 10,000 cannot be filled where most traces are longer than half of that.
FILLED = [(mix, 10_000) for mix in MIXES[:4]] + [(mix, 20_000) for mix in MIXES]


def flops_of_7b(length: int) -> float:
    """Of a forward through Qwen2.5-7B, but for the factor 2 of a multiplication and an addition.

    Every parameter but those of the embedding once per token; scores and their sums over values
    (28 layers, 28 heads of 128) once per pair of tokens, of which causal attention has half.
    """
    return 7.07e9 * length + 28 * 28 * 128 * length**2


def idle_share(plan: PackedPlan, num_ranks: int, cost, num_steps: int) -> float:
    """Share of the ranks' time lost to stand-ins and to the costliest row of a micro-step."""
    used = held = 0.0
    for step in range(num_steps):
        shares = [plan.micro_batches(step, rank, num_ranks) for rank in range(num_ranks)]
        for together in zip(*shares, strict=True):
            costs = [sum(cost(plan.lengths[index]) for index in row) for row, _ in together]
            used += sum(one for one, (_, weight) in zip(costs, together, strict=True) if weight)
            held += num_ranks * max(costs)
    return 1 - used / held


@pytest.mark.parametrize(("mix", "row_tokens"), FILLED)
def test_less_than_a_fiftieth_of_the_budget_is_empty(mix, row_tokens):
    lengths = traces(*mix)
    plan = PackedPlan(lengths, row_tokens, 32, seed=0)
    rows = sum(len(plan.groups(step)) for step in range(plan.steps_per_epoch))
    assert plan.empty_share == pytest.approx(1 - sum(lengths) / (rows * row_tokens))
    assert plan.empty_share < 0.02


@pytest.mark.parametrize("row_tokens", [10_000, 20_000])
@pytest.mark.parametrize("mix", MIXES)
def test_ranks_idle_less_than_a_fiftieth_of_the_time(mix, row_tokens):
    """Also where rows cannot be filled, and with attention's part if there are rows to sort."""
    lengths = traces(*mix)
    for num_ranks, rows_per_rank in ((8, 1), (8, 4), (64, 1), (64, 4)):
        plan = PackedPlan(lengths, row_tokens, num_ranks * rows_per_rank, seed=0)
        steps = plan.steps_per_epoch
        assert idle_share(plan, num_ranks, float, steps) < 0.02
        if rows_per_rank > 1:
            # In the last step of an epoch many of 64 ranks have no row.
            steps -= num_ranks == 64
            assert idle_share(plan, num_ranks, flops_of_7b, steps) < 0.02


def test_no_packing_needs_fewer_rows_than_the_fullest_possible():
    assert pack(range(6), [5, 5, 4, 4, 3, 3], 12) == [[0, 1], [2, 3, 4]] + [[5]]
    assert pack([2, 1, 0], [7, 3, 10], 10) == [[2], [0, 1]]
    assert len(pack(range(1000), [5] * 1000, 10)) == 500


def test_a_token_budget_must_fit():
    run = RunConfig(output_dir="x", train_batch_tokens=60, per_device_train_batch_tokens=10)
    assert PackedPlan.from_config(run, [10, 3], 3).rows_per_step == 6
    with pytest.raises(UserError, match="run.train_batch_tokens: 60 .* times 4 rank.* multiple of"):
        PackedPlan.from_config(run, [10], 4)
    with pytest.raises(UserError, match="per_device_train_batch_tokens: 10 is less .* 11 tokens"):
        PackedPlan.from_config(run, [4, 11], 1)


# Batches


def test_worker_processes_give_the_same_batches(tmp_path):
    corpus = corpus_of(tmp_path)
    steps, ours = range(2, 7), plan(num_sequences=9)
    cache: dict = {}
    here = list(step_batches(corpus, encoder(), ours, steps, cache=cache))
    there = list(step_batches(corpus, encoder(), ours, steps, num_workers=2))
    assert len(here) == len(there) == 5 and len(cache) == 9
    for one, other in zip(here, there, strict=True):
        assert one[1:] == other[1:]
        for ours_, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours_[:3], theirs[:3], strict=True))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_while_tokenizing_arrives_as_one_line(tmp_path, num_workers):
    strict = encoder(truncate=False, max_length=40)
    ours = plan(num_sequences=9)
    batches = step_batches(corpus_of(tmp_path), strict, ours, range(3), num_workers=num_workers)
    errors = [batch.error for batch in batches]
    assert any(errors)
    assert all("\n" not in error for error in errors)


def test_a_packed_step_holds_its_sequences(tmp_path):
    corpus, ours = corpus_of(tmp_path), encoder()
    encoded = [ours.encode(corpus.conversation(i)) for i in range(9)]
    plan = PackedPlan([len(one.ids) for one in encoded], 90, 2, seed=0)
    for step, batch in enumerate(step_batches(corpus, ours, plan, range(plan.steps_per_epoch))):
        rows = plan.groups(step)
        counts = [micro_batch.num_sequences for micro_batch in batch.micro_batches]
        assert counts == list(map(len, rows))
        for row, micro_batch in zip(rows, batch.micro_batches, strict=True):
            ids = [encoded[index].ids.tolist() for index in row]
            assert micro_batch.input_ids.tolist() == [sum(ids, [])]
            assert micro_batch.labels.tolist() == [[t for one in ids for t in (-100, *one[1:])]]
            assert micro_batch.packing.boundaries.diff().tolist() == list(map(len, ids))
            assert micro_batch.attention_mask.all()
        assert batch.real_tokens == sum(len(encoded[index].ids) for row in rows for index in row)


def test_prompts_in_packed_rows_can_be_left_out(tmp_path):
    corpus, ours = corpus_of(tmp_path), encoder(loss_on_prompt=False)
    row = pack_row([ours.encode(corpus.conversation(i)) for i in (2, 4)], loss_on_prompt=False)
    expected = []
    for index in (2, 4):
        one = ours.encode(corpus.conversation(index))
        expected += [-100] * one.prompt_length + one.ids[one.prompt_length :].tolist()
    assert row.labels.tolist() == [expected]


# Ahead of the loop


def test_items_come_in_order_from_a_thread_that_ends():
    threads = []

    def items():
        for number in range(50):
            threads.append(threading.current_thread())
            yield number

    assert list(ahead(items())) == list(range(50))
    assert threads[0] is not threading.main_thread() and not threads[0].is_alive()


def test_only_a_few_items_are_made_before_they_are_needed():
    made = []
    batches = ahead(made.append(number) or number for number in range(100))
    assert next(batches) == 0
    batches.close()
    assert len(made) <= 5
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_what_the_thread_meets_is_raised_in_its_place():
    def items():
        yield 1
        raise KeyError("here")

    batches = ahead(items())
    assert next(batches) == 1
    with pytest.raises(KeyError, match="here"):
        next(batches)
