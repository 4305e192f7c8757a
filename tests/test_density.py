"""Counts that arrive late are used late, and never waited for."""

import copy

import torch

from tca_fast.density import DensityObserver


class Arrival:
    """Stands for the event of a copy that is still on its way."""

    arrived = False

    def query(self) -> bool:
        return self.arrived


def test_the_largest_share_since_the_last_call():
    observer = DensityObserver()
    assert observer.take() is None
    for count in (3, 8, 5):
        observer.observe(torch.tensor(count), 80)
    assert observer.take() == 0.1
    assert observer.take() is None


def test_nothing_is_learned_from_an_empty_batch():
    observer = DensityObserver()
    observer.observe(torch.tensor(0), 0)
    assert observer.take() is None


def test_a_count_on_its_way_is_left_for_later():
    observer, arrival = DensityObserver(), Arrival()
    observer._pending.append((torch.tensor(4), arrival, 8))
    assert observer.take() is None
    arrival.arrived = True
    assert observer.take() == 0.5


def test_a_copy_starts_without_observations():
    observer = DensityObserver()
    observer._pending.append((torch.tensor(4), Arrival(), 8))
    assert copy.deepcopy(observer).take() is None
