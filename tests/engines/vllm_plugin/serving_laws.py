"""Exact laws of what a model says next, and weights that have moved, for tests of servers."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch


class NextTokens:
    """The law of the next few tokens after a prompt, by a plain forward of every beginning.

    Args:
        model: Folder of a model of transformers.
        prompt: Token ids.
        length: Tokens of an outcome.
        stop: Token that ends a response.

    Attributes:
        outcomes: Sequences with a probability of note; the last place of `counts` and `law` is for
            all others together.
        law: [len(outcomes) + 1], float64.
    """

    def __init__(self, model: str, prompt: Sequence[int], length: int, stop: int) -> None:
        from transformers import AutoModelForCausalLM

        net = AutoModelForCausalLM.from_pretrained(model).float().eval()
        known: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(length):
            longer: dict[tuple[int, ...], float] = {}
            for start, probability in known.items():
                if start and start[-1] == stop:
                    longer[start] = probability
                    continue
                with torch.no_grad():
                    logits = net(torch.tensor([[*prompt, *start]])).logits[0, -1]
                for token, share in enumerate(logits.double().softmax(-1).tolist()):
                    if probability * share > 1e-5:
                        longer[*start, token] = probability * share
            known = longer
        self.outcomes = list(known)
        rest = max(0.0, 1.0 - sum(known.values()))
        self.law = np.array([*known.values(), rest])

    def counts(self, found: Iterable[Sequence[int]]) -> np.ndarray:
        """How often each outcome was found. [len(outcomes) + 1], int64."""
        places = {outcome: i for i, outcome in enumerate(self.outcomes)}
        counts = np.zeros(len(self.outcomes) + 1, np.int64)
        for tokens in found:
            counts[places.get(tuple(tokens), -1)] += 1
        return counts


def moved_weights(model: str, folder: Path, scale: float, seed: int = 0) -> str:
    """A copy of a model, every matrix of it moved by noise of `scale` times its own deviation."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(seed)
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        for weight in weights.values():
            if weight.ndim > 1:
                weight += scale * weight.std() * torch.randn(weight.shape, generator=generator)
        save_file(weights, path, metadata={"format": "pt"})
    return str(folder)
