"""How much of a prompt's rollouts is that of the epoch before: ROUGE-1, as SPEC-RL's figure 2."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from spec_rollout.types import Rollouts

_WORD = re.compile(r"\w+")
Decode = Callable[[list[list[int]]], Sequence[str]]


def rouge1(one: str, other: str) -> float:
    """F-measure of the words that two texts share, each as often as both have it (Lin, 2004).

    Words are runs of letters, digits and underscores, of any script, without case; 1 for two texts
    without words.
    """
    a, b = Counter(_WORD.findall(one.lower())), Counter(_WORD.findall(other.lower()))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


class ResponseFiles:
    """Keeps the responses of a run until it has ended, a file per step; `add` is a callback of the
    trainer.

    Files, because a run may be ended and gone on with. Of a step that makes several calls the first
    one counts, that of its own prompts.

    Args:
        folder: Made when there is something to keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: int | None = None

    def add(self, step: int, rollouts: Rollouts) -> None:
        """Keeps one step's responses; a step done again replaces them."""
        if step == self._last:
            return
        self._last = step
        self._folder.mkdir(exist_ok=True)
        np.savez_compressed(
            self._folder / f"step-{step:08d}.npz",
            prompt_ids=rollouts.prompt_ids.numpy(),
            cu_prompt_lens=rollouts.cu_prompt_lens.numpy(),
            ids=rollouts.response_ids.numpy(),
            cu_lens=rollouts.cu_response_lens.numpy(),
        )

    def remove(self) -> None:
        """What is no longer needed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def overlaps(self, epochs: Mapping[int, int], decode: Decode) -> dict[int, float]:
        """Mean ROUGE-1 of each epoch's responses with those of the epoch before, sample by sample.

        Args:
            epochs: Epoch (0-based) of each step (from 1).
            decode: Texts of responses.

        Returns:
            By epoch; the first one has none.
        """
        found: dict[int, float] = {}
        before: dict[tuple[bytes, int], str] = {}
        for epoch in sorted(set(epochs.values())):
            steps = sorted(step for step, of in epochs.items() if of == epoch)
            texts = self._texts(steps, decode)
            both = texts.keys() & before.keys()
            if both:
                scores = [rouge1(texts[key], before[key]) for key in both]
                found[epoch] = sum(scores) / len(scores)
            before = texts
        return found

    def _texts(self, steps: Sequence[int], decode: Decode) -> dict[tuple[bytes, int], str]:
        """Text of each response, by its prompt and its place among those of the prompt."""
        found: dict[tuple[bytes, int], str] = {}
        counts: Counter[bytes] = Counter()
        for step in steps:
            path = self._folder / f"step-{step:08d}.npz"
            if not path.is_file():
                continue
            with np.load(path) as file:
                prompts = _rows(file["prompt_ids"], file["cu_prompt_lens"])
                responses = _rows(file["ids"], file["cu_lens"])
            texts = decode([row.tolist() for row in responses])
            for prompt, text in zip(prompts, texts, strict=True):
                key = prompt.tobytes()
                found[key, counts[key]] = text
                counts[key] += 1
        return found


def _rows(values: np.ndarray, cu_lens: np.ndarray) -> list[np.ndarray]:
    return np.split(values, cu_lens[1:-1])
