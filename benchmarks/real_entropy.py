"""Which guesses of the next token pass, by how uncertain the policy is there; for bench_real.py.

Every token of `new`'s responses is guessed from what is known before it, under the noise it was
drawn with:

| guess | |
|---|---|
| old mode | the likeliest token of the old policy, given the same words |
| old sample | what the old policy draws there with the same noise (what `Coupled` tests) |
| history | what followed the same words in the prompt's old rollouts, and in its live siblings' |
| history and noise | of those the one that the noise will pick (history drafting) |

A guess of the mode is right as often as the token is likely, so it falls off where the policy is
uncertain. A guess of the sample need not: old and new policy draw with the same noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_policies import prompt_ids, questions

from spec_rollout import NoReuse, RolloutSession, TransformersEngine, ops
from spec_rollout.drafting import HistoryDrafter
from spec_rollout.types import History, RolloutRequests, Rollouts, SamplingParams

# Nats; the last bin is open.
EDGES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
GUESSES = ("old mode", "old sample", "history", "history and noise")


class _Noted:
    """An engine that keeps the requests of its last call."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.requests: RolloutRequests | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def rollout(self, requests: RolloutRequests, sampling: Any, acceptance: Any) -> Rollouts:
        self.requests = requests
        return self._engine.rollout(requests, sampling, acceptance)


@torch.no_grad()
def guesses(
    old: Path,
    new: Path,
    prompts: list[list[int]],
    group: int,
    sampling: SamplingParams,
) -> dict[str, np.ndarray]:
    """Of every token of the new policy's responses.

    Returns:
        `entropy` and `divergence` (of the new policy from the old one), nats, float64; whether each
        of `GUESSES` is the token, float64, NaN where there is no guess. [num_tokens] each.
    """
    from transformers import AutoModelForCausalLM

    models, rolled, keys = [], [], torch.empty(0)
    for folder in (old, new):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        noted = _Noted(TransformersEngine(model))
        session = RolloutSession(noted, NoReuse(), seed=0)
        rolled.append(session.rollout(prompts, group, sampling, step=0, epoch=0))
        assert noted.requests is not None
        models.append(model)
        keys = noted.requests.keys
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("entropy", "divergence")}
    found |= {name: [] for name in GUESSES[:2]}
    after = rolled[1]
    starts, cu = after.cu_prompt_lens.tolist(), after.cu_response_lens.tolist()
    for row in range(after.batch):
        prompt = after.prompt_ids[starts[row] : starts[row + 1]].long()
        response = after.response_ids[cu[row] : cu[row + 1]].long()
        ids = torch.cat([prompt, response])[None]
        before, now = (model(ids).logits[0, prompt.numel() - 1 : -1].float() for model in models)
        p, q = ((one / sampling.temperature).log_softmax(-1) for one in (now, before))
        found["entropy"].append(-(p.exp() * p).sum(-1).numpy())
        found["divergence"].append((p.exp() * (p - q)).sum(-1).numpy())
        found["old mode"].append((before.argmax(-1) == response).double().numpy())
        drawn = ops.sample_tokens(
            before,
            keys=keys[row].expand(response.numel()).contiguous(),
            positions=torch.arange(response.numel()),
            temperature=sampling.temperature,
        )
        found["old sample"].append((drawn.token_ids == response).double().numpy())
    joined = {name: np.concatenate(parts).astype(np.float64) for name, parts in found.items()}
    stops = sampling.stop_token_ids
    for name, noise in (("history", None), ("history and noise", keys.numpy())):
        joined[name] = _replayed(rolled[0], after, group, stops, noise)
    return joined


def _replayed(
    before: Rollouts, after: Rollouts, group: int, stops: tuple[int, ...], keys: np.ndarray | None
) -> np.ndarray:
    """Whether what history drafting proposes first is the token. All rows advance together, token
    by token. [num_tokens]; NaN where nothing is proposed."""
    groups = torch.arange(after.batch) // group
    history = History(before.response_ids, before.cu_response_lens, groups, groups, before.logprobs)
    drafter = HistoryDrafter(history, stops)
    cu, ids = after.cu_response_lens.numpy(), after.response_ids.numpy()
    lens, logprobs = np.diff(cu), after.logprobs.numpy()
    right = np.full(ids.size, np.nan)
    for position in range(int(lens.max())):
        live = np.flatnonzero(lens > position)
        at = cu[live] + position
        if position:
            proposals = drafter.propose(
                live,
                np.ones(live.size, dtype=np.int64),
                0.0,
                keys=None if keys is None else keys[live],
                positions=None if keys is None else np.full(live.size, position),
            )
            some = proposals.lens > 0
            passed = proposals.token_ids == ids[at[some]]
            right[at[some]] = passed
            accepted = np.zeros(live.size, dtype=np.int64)
            accepted[some] = passed
            drafter.observe(live, accepted)
        ones = np.ones(live.size, dtype=np.int64)
        drafter.extend(live, ids[at], ones, logprobs[at])
    return right


def binned(found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Shares of right guesses by entropy, and what the policies are like.

    `bins` has one item for each of `EDGES`; a share is None where nothing was guessed.
    """
    which = np.digitize(found["entropy"], EDGES[1:])
    bins = []
    for number, low in enumerate(EDGES):
        inside = which == number
        shares = {}
        for name in GUESSES:
            known = found[name][inside & ~np.isnan(found[name])]
            shares[name] = round(float(known.mean()), 4) if known.size else None
        entropy = float(found["entropy"][inside].mean()) if inside.any() else None
        bins.append({"from": low, "tokens": int(inside.sum()), "entropy": entropy, **shares})
    return {
        "tokens": int(which.size),
        "entropy": round(float(found["entropy"].mean()), 4),
        "divergence": round(float(found["divergence"].mean()), 6),
        "right": {name: round(float(np.nanmean(found[name])), 4) for name in GUESSES},
        "guessed": {name: round(float((~np.isnan(found[name])).mean()), 4) for name in GUESSES},
        "bins": bins,
    }


def plot(content: dict[str, Any], path: Path) -> None:
    """Shares of right guesses over entropy, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, style in zip(GUESSES, ("o--", "o-", "s--", "s-"), strict=True):
        points = [
            (one["entropy"], one[name])
            for one in content["bins"]
            if one["tokens"] >= 20 and one[name] is not None
        ]
        axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set(
        xlabel="entropy of the policy at the position, nats",
        ylabel="share of guesses that pass",
        ylim=(0, 1.03),
        xlim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--old", type=Path, required=True)
    options.add_argument("--new", type=Path, required=True)
    options.add_argument("--data", type=Path)
    options.add_argument("--prompts", type=int, required=True)
    options.add_argument("--group", type=int, required=True)
    options.add_argument("--max-tokens", type=int, required=True)
    options.add_argument("--temperature", type=float, required=True)
    args = options.parse_args()
    from real_rollouts import sampling_of

    prompts = prompt_ids(questions(args.data, args.prompts), args.old)
    found = guesses(args.old, args.new, prompts, args.group, sampling_of(args))
    print("ENTROPY " + json.dumps(binned(found)), flush=True)


if __name__ == "__main__":
    main()
