"""A store on disk over many epochs: does memory stay flat, and the file bounded?

    python benchmarks/soak.py

100,000 prompts of 8 rollouts of 1,400 tokens on average (log-probs kept) are looked up and stored,
in steps of 128 prompts shuffled anew each epoch, under a bound that holds a part of them, so that
groups are evicted all the time. Every so many steps the state is marked as a checkpoint does, and
the newest two marks are kept. After every hundredth of the steps: resident memory of the process
without the mapped file, bytes held, bytes of the file, share of the drafts found. Every draft found
is compared with what was stored. Written to results/soak.json; exit status 1 if one was wrong.

    python benchmarks/soak.py --prompts 2000 --bound-gib 0.2     # a short one
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Results, Timing, copy_bandwidth, parser

from spec_rollout.cache import DiskStore, RolloutCache
from spec_rollout.cache.writer import Writer
from spec_rollout.keys import prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import FinishReason, Rollouts

NUM_SAMPLES = 8


def anonymous_bytes() -> int:
    """Resident memory that is not of a mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def lens_of(prompts: np.ndarray, epoch: int) -> np.ndarray:
    """Lengths of all rollouts of some prompts in an epoch. [prompts * samples], int64."""
    lens = [np.random.default_rng([epoch, p]).gamma(2.0, 700.0, NUM_SAMPLES) for p in prompts]
    return np.concatenate(lens).clip(8, 8000).astype(np.int64)


def tokens_of(prompts: np.ndarray, epoch: int, lens: np.ndarray) -> np.ndarray:
    """Token ids that say whose they are: prompt, sample, epoch, then counted up."""
    starts = np.repeat(prompts * 1000 + epoch, NUM_SAMPLES) * 8 + np.tile(
        np.arange(NUM_SAMPLES), len(prompts)
    )
    offsets = np.arange(lens.sum()) - np.repeat(lens.cumsum() - lens, lens)
    return ((np.repeat(starts, lens) + offsets) % (2**31 - 1)).astype(np.int32)


def rollouts_of(prompts: np.ndarray, epoch: int) -> Rollouts:
    lens = lens_of(prompts, epoch)
    tokens = torch.from_numpy(tokens_of(prompts, epoch, lens))
    batch = len(lens)
    return Rollouts(
        prompt_ids=torch.ones(batch, dtype=torch.int32),
        cu_prompt_lens=torch.arange(batch + 1),
        response_ids=tokens,
        cu_response_lens=cu_lens_from(torch.from_numpy(lens)),
        logprobs=tokens.float().neg(),
        accepted_lens=torch.zeros(batch, dtype=torch.int32),
        finish_reasons=torch.full((batch,), int(FinishReason.STOP), dtype=torch.uint8),
    )


class Soak:
    """One store under the load of a run."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.store = DiskStore(folder)
        self.writer = Writer()
        self.cache = RolloutCache(max_bytes, store=self.store, writer=self.writer)
        self.stored: dict[int, int] = {}  # the last epoch of each prompt
        self.wrong = self.found = self.asked = 0
        self.seconds: dict[str, list[float]] = {"lookup": [], "hand over": []}

    def step(self, prompts: np.ndarray, epoch: int) -> None:
        keys = [prompt_key([int(p)]) for p in prompts for _ in range(NUM_SAMPLES)]
        ids = list(range(NUM_SAMPLES)) * len(prompts)
        self.cache.flush()
        start = time.perf_counter()
        drafts = self.cache.lookup(keys, ids, max_tokens=8000)
        self.seconds["lookup"].append(time.perf_counter() - start)
        found = drafts.lens.reshape(-1, NUM_SAMPLES)[:, 0].numpy() > 0
        there = prompts[found]
        if len(there):
            lens = [lens_of(np.array([p]), self.stored[int(p)]) for p in there]
            ids_there = [
                tokens_of(np.array([p]), self.stored[int(p)], length)
                for p, length in zip(there, lens, strict=True)
            ]
            same = np.array_equal(np.concatenate(ids_there), drafts.token_ids.numpy())
            self.wrong += not same
        self.found += int(found.sum())
        self.asked += len(prompts)
        rollouts = rollouts_of(prompts, epoch)
        start = time.perf_counter()
        self.cache.store(keys, ids, rollouts)
        self.seconds["hand over"].append(time.perf_counter() - start)
        self.stored.update(dict.fromkeys(map(int, prompts), epoch))

    def row(self) -> dict[str, Any]:
        stats = self.cache.stats
        row = {
            "anonymous_bytes": anonymous_bytes(),
            "held_bytes": stats.num_bytes,
            "file_bytes": self.store.file_bytes(),
            "found_share": round(self.found / max(1, self.asked), 4),
            "evictions": stats.evictions,
            "corrupt": stats.corrupt,
        }
        self.found = self.asked = 0
        return row


def timing_of(seconds: list[float]) -> Timing:
    p20, p50, p80 = np.percentile(seconds, [20, 50, 80]).tolist()
    return Timing(p20, p50, p80, len(seconds))


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--prompts", type=int, default=100_000)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--step-prompts", type=int, default=128)
    options.add_argument("--bound-gib", type=float, default=4.0)
    options.add_argument("--mark-every", type=int, default=50, help="steps")
    options.add_argument("--folder", type=Path, help="of the store; a temporary one if left out")
    args = options.parse_args()
    if args.quick:
        args.prompts, args.bound_gib, args.step_prompts = 96, 0.004, 16
    bandwidth = (lambda: copy_bandwidth(1 << 24)) if args.quick else copy_bandwidth
    results = Results("soak", args.out, bandwidth)
    rng = np.random.default_rng(0)
    per_epoch = -(-args.prompts // args.step_prompts)
    every = max(1, per_epoch * args.epochs // 100)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        soak = Soak(Path(folder) / "store", int(args.bound_gib * 2**30))
        done = 0
        for epoch in range(args.epochs):
            order = rng.permutation(args.prompts)
            for start in range(0, args.prompts, args.step_prompts):
                soak.step(order[start : start + args.step_prompts], epoch)
                done += 1
                if done % args.mark_every == 0:
                    soak.cache.flush()
                    soak.store.mark()
                    soak.store.keep_marks(soak.store.marks()[-2:])
                if done % every == 0:
                    timing = timing_of(soak.seconds["lookup"][-every:])
                    results.add(f"after step {done}", timing=timing, **soak.row())
        for name, seconds in soak.seconds.items():
            results.add(name, timing=timing_of(seconds), shape={"prompts": args.step_prompts})
        soak.writer.close()
        soak.store.close()
    results.rows.append({"op": "wrong drafts", "steps": soak.wrong})
    results.write()
    return soak.wrong > 0


if __name__ == "__main__":
    sys.exit(main())
