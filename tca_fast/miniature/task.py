"""The miniature's problems: three verifiable chain tasks, easy step by step and hard in one go.

Source: own design; the domains mirror OpenThoughts3 (math, code, science), the response format
DeepSeek-R1's (contract 4.2). Arithmetic is on single digits modulo 10, from left to right.

    math     ``digit of:3;a*7;b+5;c*3;d-8``       last digit of the running value
    code     ``run:4;a+3;b<5*7;c-8;d*3``          ``<5*7``: if the value is below 5, times 7
    science  ``react: zinc;a heat;b acid;c cool``  substance after treatments by invented laws

A thought writes every step. In three situations, decided by the step alone (so that greedy
decoding shows it), a step is first forgotten, its value left as it was. The *careless* style, the
base's, does not notice; the *reasoning* style, the target's, says ``wait`` and does the step again,
rightly:

    math     at ``*7``                           ``c:3*7=3 wait`` then ``c:3*7=1``
    code     at ``-`` under a condition that holds  ``b:4<5-3=4 wait`` then ``b:4<5-3=1``
    science  at ``acid``                     ``b: oil acid= oil wait`` then ``b: oil acid= salt``
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Style = Literal["direct", "careless", "reasoning"]
DOMAINS = ("math", "code", "science")
DOMAIN_SHARES = (0.35, 0.4, 0.25)

LABELS = "abcde"
SUBSTANCES = ("gas", "ice", "iron", "lime", "oil", "rust", "salt", "zinc")
TREATMENTS = ("heat", "cool", "press", "acid")
SLIPPING_TREATMENT = "acid"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


def _cycle(seed: int) -> dict[str, str]:
    """Substance to substance, one cycle through all of them."""
    ring = random.Random(seed).sample(SUBSTANCES, len(SUBSTANCES))
    return dict(zip(ring, ring[1:] + ring[:1], strict=True))


# What each treatment turns each substance into: one cycle through all substances, drawn once, so
# that no treatment leaves a substance as it was and a chain of them forgets nothing.
LAWS = {treatment: _cycle(seed) for seed, treatment in enumerate(TREATMENTS)}
_ANSWER = re.compile(r"\s*answer=\s*(\w+)\s*")


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a worked solution.

    ``text`` is the correct line, ``slip`` the careless line where the situation invites one.
    """

    text: str
    slip: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt, the steps that solve it and the answer (a digit or a substance).

    ``careless_lines`` and ``careless_answer`` are what comes out when every slip goes unnoticed.
    """

    domain: str
    prompt: str
    steps: tuple[Step, ...]
    answer: str
    careless_lines: tuple[str, ...]
    careless_answer: str

    @property
    def difficulty(self) -> int:
        """Number of chained steps."""
        return len(self.steps)

    def response(self, style: Style) -> str:
        """The response text: ``direct`` is the right answer alone, ``careless`` and ``reasoning``
        have a thought before it.
        """
        if style == "direct":
            return self._state(self.answer)
        if style == "careless":
            lines, answer = list(self.careless_lines), self.careless_answer
        else:
            lines = [f"{s.slip} wait\n{s.text}" if s.slip else s.text for s in self.steps]
            answer = self.answer
        return "\n".join((THINK_OPEN, *lines, THINK_CLOSE, self._state(answer)))

    def _state(self, answer: str) -> str:
        return f"answer={' ' if self.domain == 'science' else ''}{answer}"


@dataclass(frozen=True, slots=True)
class _Move:
    """One link of a chain: what the prompt shows, and what it does to a value.

    ``apply`` maps a value to (the line up to its ``=``, the value after it, whether it slips).
    """

    shown: str
    apply: Callable[[str], tuple[str, str, bool]]


def _problem(domain: str, head: str, start: str, moves: list[_Move]) -> Problem:
    """Carry ``start`` through ``moves``, once rightly and once with every slip unnoticed."""
    space = " " if domain == "science" else ""
    steps, careless_lines = [], []
    value = careless = start
    for move in moves:
        text, after, slips = move.apply(value)
        slip = f"{text}={space}{value}" if slips else None
        steps.append(Step(f"{text}={space}{after}", slip))
        value = after
        text, after, slips = move.apply(careless)
        careless = careless if slips else after
        careless_lines.append(f"{text}={space}{careless}")
    prompt = ";".join((f"{head}:{space}{start}", *(move.shown for move in moves)))
    return Problem(domain, prompt, tuple(steps), value, tuple(careless_lines), careless)


def _operate(left: int, operator: str, right: int) -> int:
    """``left operator right`` modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def _operand(rng: random.Random, operator: str) -> int:
    """A digit; multipliers are invertible modulo 10, so that no step forgets the ones before."""
    return rng.choice((3, 7, 9)) if operator == "*" else rng.randint(1, 9)


def _math_move(label: str, operator: str, right: int) -> _Move:
    def apply(value: str) -> tuple[str, str, bool]:
        after = _operate(int(value), operator, right)
        return f"{label}:{value}{operator}{right}", str(after), operator == "*" and right == 7

    return _Move(f"{label}{operator}{right}", apply)


def _code_move(label: str, bound: int, operator: str, right: int) -> _Move:
    """``bound`` 10 means unconditional: every digit is below it."""
    condition = f"<{bound}" if bound < 10 else ""

    def apply(value: str) -> tuple[str, str, bool]:
        if int(value) >= bound:
            return f"{label}:{value}{condition}", value, False
        after = _operate(int(value), operator, right)
        slips = bool(condition) and operator == "-"
        return f"{label}:{value}{condition}{operator}{right}", str(after), slips

    return _Move(f"{label}{condition}{operator}{right}", apply)


def _science_move(label: str, treatment: str) -> _Move:
    def apply(value: str) -> tuple[str, str, bool]:
        slips = treatment == SLIPPING_TREATMENT
        return f"{label}: {value} {treatment}", LAWS[treatment][value], slips

    return _Move(f"{label} {treatment}", apply)


def make_math(rng: random.Random) -> Problem:
    """A digit, then four or five operations on it, from left to right modulo 10."""
    moves = []
    for label in LABELS[: rng.randint(4, 5)]:
        operator = rng.choice("+-**")
        moves.append(_math_move(label, operator, _operand(rng, operator)))
    return _problem("math", "digit of", str(rng.randint(1, 9)), moves)


def make_code(rng: random.Random) -> Problem:
    """A program of four or five instructions on one digit modulo 10, about half conditional."""
    moves = []
    for label in LABELS[: rng.randint(4, 5)]:
        operator = rng.choice("+-*")
        bound = rng.randint(3, 7) if rng.random() < 0.5 else 10
        moves.append(_code_move(label, bound, operator, _operand(rng, operator)))
    return _problem("code", "run", str(rng.randint(1, 9)), moves)


def make_science(rng: random.Random) -> Problem:
    """A substance and four or five treatments; each permutes the substances by a fixed law."""
    count = rng.randint(4, 5)
    moves = [_science_move(label, rng.choice(TREATMENTS)) for label in LABELS[:count]]
    return _problem("science", "react", rng.choice(SUBSTANCES), moves)


_MAKERS: dict[str, Callable[[random.Random], Problem]] = {
    "math": make_math,
    "code": make_code,
    "science": make_science,
}


def make_problem(rng: random.Random) -> Problem:
    """One problem of a random domain, in the shares of ``DOMAIN_SHARES``."""
    return _MAKERS[rng.choices(DOMAINS, DOMAIN_SHARES)[0]](rng)


def make_problems(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
    """``count`` problems with distinct prompts, none of them in ``exclude``; equal for equal
    arguments.
    """
    rng, seen = random.Random(seed), set(exclude)
    problems: list[Problem] = []
    while len(problems) < count:
        problem = make_problem(rng)
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            problems.append(problem)
    return problems


def extract_answer(response: str) -> str | None:
    """The stated answer, or None if there is none.

    Only what follows the single ``</think>`` counts, or the whole response if it has no thought; a
    thought that was opened and never closed has no answer.
    """
    if THINK_CLOSE in response:
        _, _, response = response.partition(THINK_CLOSE)
    found = _ANSWER.fullmatch(response)
    return found.group(1) if found else None


def is_correct(answer: str, response: str) -> bool:
    """Whether ``response`` (text without special turn tokens) states exactly ``answer`` and
    nothing else.
    """
    return extract_answer(response) == answer


def count_waits(response: str) -> int:
    """Number of hesitations: occurrences of the word ``wait``."""
    return len(re.findall(r"\bwait\b", response))
