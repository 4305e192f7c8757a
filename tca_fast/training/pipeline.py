"""The batches of a run in their order, made ahead of the training loop."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from tca_fast.errors import UserError
from tca_fast.training.batches import StepBatch, make_step_batch, worker_options
from tca_fast.training.data import Corpus, Encoded, Encoder
from tca_fast.training.plans import Plan

T = TypeVar("T")
_AHEAD = 2  # batches that wait for the loop
_PATIENCE_SECONDS = 0.1


class _Steps(Dataset[StepBatch]):
    """Map-style dataset whose item `step` is that optimizer step's share of one rank."""

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        plan: Plan,
        rank: int,
        num_ranks: int,
        cache: Mapping[int, Encoded] | None,
    ) -> None:
        self.corpus, self.encoder, self.plan = corpus, encoder, plan
        self.rank, self.num_ranks = rank, num_ranks
        self.cache = cache

    def __getitem__(self, step: int) -> StepBatch:
        dealt = self.plan.micro_batches(step, self.rank, self.num_ranks)
        try:
            return make_step_batch(self.corpus, self.encoder, dealt, self.cache, self.plan.collate)
        except UserError as error:
            # Returned rather than raised: a DataLoader worker would wrap it in a traceback.
            return StepBatch([], error=str(error))


def step_batches(
    corpus: Corpus,
    encoder: Encoder,
    plan: Plan,
    steps: range,
    rank: int = 0,
    num_ranks: int = 1,
    cache: Mapping[int, Encoded] | None = None,
    *,
    num_workers: int = 0,
) -> Iterator[StepBatch]:
    """This rank's share of each optimizer step in `steps`, in order.

    Args:
        corpus, encoder: the file, and how its lines become ids.
        plan: which sequences make which step.
        steps: optimizer steps, counted from 0.
        rank, num_ranks: of data parallelism.
        cache: has or keeps ids by sequence index; of no use to workers, which forget.
        num_workers: processes that tokenize; 0 is this one.
    """
    dataset = _Steps(corpus, encoder, plan, rank, num_ranks, None if num_workers else cache)
    # A range is a sequence of step numbers.
    return iter(DataLoader(dataset, sampler=steps, **worker_options(num_workers)))


def ahead(items: Iterator[T], number: int = _AHEAD) -> Generator[T, None, None]:
    """The same items, taken from their iterator by a thread before they are asked for.

    Close the generator to end the thread early. What the iterator raises is raised here, after
    the items before it.
    """
    made: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(number)
    is_closed = threading.Event()

    def hand_over(is_item: bool, value: T | BaseException | None) -> bool:
        while not is_closed.is_set():
            with contextlib.suppress(queue.Full):
                made.put((is_item, value), timeout=_PATIENCE_SECONDS)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not hand_over(True, item):
                    return
        except BaseException as error:
            hand_over(False, error)
        else:
            hand_over(False, None)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = made.get()
            if is_item:
                yield value  # type: ignore[misc]
            elif isinstance(value, BaseException):
                raise value
            else:
                return
    finally:
        is_closed.set()
        thread.join()
