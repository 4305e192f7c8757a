"""Bytes damaged at random, and a limit on how long a case may take."""

import contextlib
import random
import signal

import pytest
from conftest import is_long


def number_of_cases(config: pytest.Config) -> int:
    return 10_000 if is_long(config) else 300


@contextlib.contextmanager
def within_seconds(seconds: int, case: object):
    def give_up(number, frame):
        raise TimeoutError(f"case {case} hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, double, blank or drop some bytes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 3, 20))):
        if not changed:
            break
        place = draw.randrange(len(changed))
        length = draw.choice((1, 1, 8, 100))
        kind = draw.randrange(6)
        if kind <= 1:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length]
        else:
            changed[place : place + length] = bytes(len(changed[place : place + length]))
    return bytes(changed)
