"""The demo task: work out a chain of additions and subtractions in words, in any order.

A prompt is a start and four or five signed terms, `"62 +7 -8 +3 -5 =?\\n"`. A response walks to the
total with one clause per term, `"from 62. then add 3 gives 65, minus 8 is 57; ... answer: 59"`.
Terms may be taken in any order and each clause has many phrasings, so the policy keeps entropy,
while only the number after the answer marker is graded.

The teacher whose responses the model is pre-trained on makes mistakes, and more of them in hedged
clauses (`"add 3 maybe 64"`) than in plain ones: there is something for a reward to sharpen.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ANSWER_MARKER = "answer: "
MAX_RESPONSE_TOKENS = 200  # characters, end-of-sequence included; the teacher stays below

# How a problem is assigned to a split: by a hash of its prompt, so no seed can mix them.
_SPLIT_BUCKETS = {"train": (0,), "heldout": (1,), "pretrain": (2, 3, 4, 5, 6, 7)}


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt with its ground truth.

    Attributes:
        prompt: Ends with a newline; the response follows it directly.
        answer: The total, in canonical decimal form.
    """

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Teacher:
    """How often the synthetic teacher gets a clause wrong.

    Attributes:
        hedge_prob: Probability that a clause is hedged ("maybe 64").
        plain_error: Error probability of a clause that is not hedged.
        hedged_error: Error probability of a hedged clause.
    """

    hedge_prob: float = 0.4
    plain_error: float = 0.06
    hedged_error: float = 0.3

    def __post_init__(self) -> None:
        for name in ("hedge_prob", "plain_error", "hedged_error"):
            if not (0.0 <= getattr(self, name) <= 1.0):
                raise ValueError(f"{name}: expected 0 <= value <= 1, got {getattr(self, name)}")


def split_of(prompt: str) -> str:
    """The only split a prompt can appear in: "train", "heldout" or "pretrain"."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 8
    return next(name for name, buckets in _SPLIT_BUCKETS.items() if bucket in buckets)


def format_prompt(start: int, terms: Iterable[int]) -> str:
    """The prompt of a start value and signed terms."""
    return f"{start} {' '.join(f'{term:+d}' for term in terms)} =?\n"


def _draw(rng: random.Random) -> tuple[int, list[int]]:
    """A start in 30..69 and 4 or 5 different terms of size 2..9.

    Running totals stay in 13..99 in any order.
    """
    start = rng.randint(30, 69)
    sizes = rng.sample(range(2, 10), rng.choice((4, 5)))
    num_minus = rng.choice((1, 2))
    terms = [-size if i < num_minus else size for i, size in enumerate(sizes)]
    rng.shuffle(terms)
    return start, terms


def draw_problem(rng: random.Random, split: str) -> tuple[int, list[int]]:
    """Draws (start, terms) until the prompt belongs to `split`."""
    if split not in _SPLIT_BUCKETS:
        raise ValueError(f"split: expected one of {sorted(_SPLIT_BUCKETS)}, got {split!r}")
    while True:
        start, terms = _draw(rng)
        if split_of(format_prompt(start, terms)) == split:
            return start, terms


def problems(split: str, num: int, seed: int = 0) -> list[Problem]:
    """The first `num` different problems of a split under a seed.

    Args:
        split: "train", "heldout" or "pretrain"; no prompt is in two of them, whatever the seed.
        num: How many; a longer list starts with the shorter one.
        seed: Same seed, same list, on every machine.

    Raises:
        ValueError: if `split` is unknown or `num` negative.
    """
    if num < 0:
        raise ValueError(f"num: expected >= 0, got {num}")
    rng = random.Random(f"{split}:{seed}")
    found: dict[str, Problem] = {}
    while len(found) < num:
        start, terms = draw_problem(rng, split)
        prompt = format_prompt(start, terms)
        found.setdefault(prompt, Problem(prompt, str(start + sum(terms))))
    return list(found.values())


def training_problems(num: int = 256, seed: int = 0) -> list[Problem]:
    """Problems to train on; none is held out or in the pre-training corpus."""
    return problems("train", num, seed)


def heldout_problems(num: int = 256, seed: int = 0) -> list[Problem]:
    """Problems to evaluate on; none is a training problem or in the pre-training corpus."""
    return problems("heldout", num, seed)


def write_jsonl(rows: Iterable[Problem], path: str | Path) -> None:
    """Writes rows {"prompt": ..., "answer": ...}, one per line, UTF-8."""
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(text, encoding="utf-8")


def extract_answer(response: str) -> str | None:
    """What follows the last answer marker, stripped; None without a marker."""
    _, marker, tail = response.rpartition(ANSWER_MARKER)
    return tail.strip() if marker else None


def reward(prompt: str, response: str, answer: str) -> float:
    """1.0 if the response ends with the answer marker and exactly the right number, else 0.0.

    Only the final answer is verified, not the steps. The number must be written as in `answer`
    ("84", not "084").
    """
    return float(extract_answer(response) == answer.strip())


# ---- the teacher

_OPENINGS = ("start {}", "from {}", "begin at {}", "we have {}", "{} first")
_CONNECTIVES = ("then ", "now ", "next ", "so ", "also ", "")
_PLUS = ("add {}", "plus {}", "with {}")
_MINUS = ("take {}", "minus {}", "less {}")
_PLAIN_LINKS = (" gives ", " is ", " makes ", " = ", " to ")
_HEDGED_LINKS = (" maybe ", " about ", " roughly ", " say ")
_SEPARATORS = (". ", ", ", "; ")
_SLIPS = (-10, -2, -1, 1, 2, 10)


def teacher_response(start: int, terms: list[int], rng: random.Random, teacher: Teacher) -> str:
    """One response by the imperfect teacher; a wrong clause is carried on from, never corrected."""
    total = start
    parts = [rng.choice(_OPENINGS).format(start) + rng.choice(_SEPARATORS)]
    for term in rng.sample(terms, len(terms)):
        hedged = rng.random() < teacher.hedge_prob
        error = teacher.hedged_error if hedged else teacher.plain_error
        before, total = total, total + term
        if rng.random() < error:
            total = max(0, total + rng.choice(_SLIPS))
        verb = rng.choice(_PLUS if term > 0 else _MINUS).format(abs(term))
        subject = f"{before} " if rng.random() < 0.4 else ""
        link = rng.choice(_HEDGED_LINKS if hedged else _PLAIN_LINKS)
        parts += [
            rng.choice(_CONNECTIVES),
            subject,
            verb,
            link,
            str(total),
            rng.choice(_SEPARATORS),
        ]
    return "".join(parts) + f"{ANSWER_MARKER}{total}"
