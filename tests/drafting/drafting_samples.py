"""What the tests of a drafter that lives on have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from spec_rollout.drafting import Drafter
from spec_rollout.keys import prompt_key

A, B, C, D, STOP = 1, 2, 3, 4, 9
X, Y, Z = (prompt_key([n]) for n in (7, 8, 9))
SMALL_TABLE = 5 * 64 * 2**10


def generate(drafter: Drafter, handle: int, tokens: Sequence[int]) -> None:
    drafter.extend(np.array([handle]), np.array(tokens, np.int32), np.array([len(tokens)]))


def finish(drafter: Drafter, key: bytes, tokens: Sequence[int], tag: int | None = None) -> None:
    """A request that generates these tokens and leaves."""
    handle = drafter.join(key, tag=tag)
    generate(drafter, handle, tokens)
    drafter.leave(handle)


def proposed(drafter: Drafter, handle: int, limit: int = 2) -> list[int]:
    return drafter.propose(np.array([handle]), np.array([limit]), 0.0).token_ids.tolist()


def kept(drafter: Drafter) -> OrderedDict[bytes, list[list[int]]]:
    """Kept rows by group, as they are exported."""
    found: OrderedDict[bytes, list[list[int]]] = OrderedDict()
    for key, rows in drafter._native.kept_rows():
        found[key] = [np.frombuffer(ids, np.int32).tolist() for _, ids, _ in rows]
    return found
