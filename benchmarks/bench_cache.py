"""The rollout cache on one training step of the published size, beside plain files of tensors.

    python benchmarks/bench_cache.py

8,192 rollouts (1,024 prompts of 8 samples) of 1,400 tokens on average, ids and log-probs; the
lengths are those of the packed ops' benchmarks.

- `store`: the step goes into a cache that holds the step before, as from the second epoch on.
- `lookup`: the drafts of all rollouts, prompts in another order than stored (a new epoch shuffles),
  with every checksum compared.
- `store on disk`, `lookup on disk`: the same with a `DiskStore`. `store on disk` is until it is
  flushed to the device, `hand over` what of that the training thread waits for; beside the peers,
  which do all of it, that would not be like for like. `bytes_per_token` is what the store holds on
  disk beyond ids and log-probs, room that will be used again left out.
- `save`, `load`: the whole cache as one file, flushed to the device; reading it checks everything.
- `store in actors`, `lookup in actors`: with `--ray N`, and nothing else then: a `RayStore` of N
  actors, in a Ray that is started for it on this machine. `hand over` is what of storing the
  training thread waits for.

The peers are one `torch.save` and one `torch.load` of the same packed tensors, files as a training
step would leave them for the next epoch. They find nothing by prompt, keep the order they were
given and check nothing; "fsync" flushes to the device as `save` does. Files are read from the
system's page cache. What every contender gives back is checked before it is timed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "ops"))

from _common import Results, Timing, copy_bandwidth, measure, parser, peak_extra_bytes
from _workload import MEAN_LEN, PADDED_LEN, long_tailed_lens

from spec_rollout.cache import DiskStore, RayStore, RolloutCache
from spec_rollout.cache.disk_env import compact
from spec_rollout.cache.writer import Writer
from spec_rollout.keys import prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import Drafts, FinishReason, Rollouts

NUM_SAMPLES = 8


@dataclass(frozen=True)
class Step:
    """The rollouts of one step, and their rows in the order of the next epoch."""

    keys: list[bytes]
    sample_ids: list[int]
    rollouts: Rollouts
    next_rows: list[int]  # which row of this step each row of the next epoch's is

    @classmethod
    def make(cls, num_prompts: int) -> Step:
        generator = torch.Generator().manual_seed(0)
        batch = num_prompts * NUM_SAMPLES
        lens = long_tailed_lens(batch, MEAN_LEN, PADDED_LEN, generator)
        num_tokens = int(lens.sum())
        ids = torch.randint(0, 150_000, (num_tokens,), generator=generator, dtype=torch.int32)
        rollouts = Rollouts(
            prompt_ids=torch.ones(batch, dtype=torch.int32),
            cu_prompt_lens=torch.arange(batch + 1),
            response_ids=ids,
            cu_response_lens=cu_lens_from(lens),
            logprobs=torch.empty(num_tokens).exponential_(1 / 0.3, generator=generator).neg_(),
            accepted_lens=torch.zeros(batch, dtype=torch.int32),
            finish_reasons=torch.full((batch,), int(FinishReason.STOP), dtype=torch.uint8),
        )
        order = torch.randperm(num_prompts, generator=generator)
        next_rows = order[:, None] * NUM_SAMPLES + torch.arange(NUM_SAMPLES)
        return cls(
            [prompt_key([prompt]) for prompt in range(num_prompts) for _ in range(NUM_SAMPLES)],
            list(range(NUM_SAMPLES)) * num_prompts,
            rollouts,
            next_rows.flatten().tolist(),
        )

    @property
    def num_bytes(self) -> int:
        """Of ids and log-probs."""
        return self.rollouts.response_ids.nbytes + self.rollouts.logprobs.nbytes

    def store(self, cache: RolloutCache) -> None:
        cache.store(self.keys, self.sample_ids, self.rollouts)

    def lookup(self, cache: RolloutCache) -> Drafts:
        keys = [self.keys[row] for row in self.next_rows]
        sample_ids = [self.sample_ids[row] for row in self.next_rows]
        return cache.lookup(keys, sample_ids, max_tokens=PADDED_LEN)

    def check(self, drafts: Drafts) -> None:
        """Exits unless these are all rollouts, in the order of the next epoch."""
        lens = self.rollouts.response_lens.tolist()
        ids = self.rollouts.response_ids.split(lens)
        logprobs = self.rollouts.logprobs.split(lens)
        same = (
            torch.equal(drafts.token_ids, torch.cat([ids[row] for row in self.next_rows]))
            and drafts.logprobs is not None
            and torch.equal(drafts.logprobs, torch.cat([logprobs[row] for row in self.next_rows]))
            and bool(drafts.finished.all())
        )
        if not same:
            sys.exit("the drafts looked up are not the rollouts stored")


class TensorFile:
    """The peer: a step as one file of packed tensors."""

    def __init__(self, path: Path, step: Step) -> None:
        self.path = path
        rollouts = step.rollouts
        self.tensors = {
            "response_ids": rollouts.response_ids,
            "cu_response_lens": rollouts.cu_response_lens,
            "logprobs": rollouts.logprobs,
            "finish_reasons": rollouts.finish_reasons,
        }

    def save(self, *, flush: bool = False) -> None:
        with open(self.path, "wb") as out:
            torch.save(self.tensors, out)
            if flush:
                out.flush()
                os.fsync(out.fileno())

    def load(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = torch.load(self.path, weights_only=True)
        return tensors

    def check(self) -> None:
        """Exits unless the file gives back what was saved."""
        loaded = self.load()
        if not all(torch.equal(loaded[name], values) for name, values in self.tensors.items()):
            sys.exit("the tensors loaded are not the tensors saved")


def run_on_disk(results: Results, step: Step, folder: Path, repeats: int) -> None:
    """Measures the store on disk and adds its rows."""
    writer, place = Writer(), folder / "store"
    store = DiskStore(place)
    cache = RolloutCache(store=store, writer=writer)
    peer = TensorFile(folder / "step.pt", step)
    step.store(cache)
    step.check(step.lookup(cache))

    def store_and_wait() -> None:
        step.store(cache)
        cache.flush()

    def timed(function: Callable[[], object], setup: Callable[[], object] | None = None) -> Timing:
        return measure(function, repeats=repeats, setup=setup)

    shape = {"rollouts": len(step.keys), "tokens": step.rollouts.response_ids.numel()}
    torch_save = timed(lambda: peer.save(flush=True))
    torch_load = timed(peer.load)
    stored, handed_over = timed(store_and_wait), timed(lambda: step.store(cache), cache.flush)
    looked_up = timed(lambda: step.lookup(cache))
    cache.flush()
    stats = cache.stats
    writer.close()
    store.close()
    _, num_bytes = compact(place)  # without room that will be used again
    results.add(
        "store on disk",
        shape=shape,
        timing=stored,
        peers={"torch.save, fsync": torch_save},
        bytes_per_token=round((num_bytes - step.num_bytes) / shape["tokens"], 3),
    )
    results.add("hand over", shape=shape, timing=handed_over)  # to a thread; the peers do all of it
    results.add("lookup on disk", shape=shape, timing=looked_up, peers={"torch.load": torch_load})
    if stats.corrupt or stats.misses or stats.evictions:
        sys.exit(f"expected hits only, got {stats}")


def run_in_actors(results: Results, step: Step, num_actors: int, repeats: int) -> None:
    """Measures a store in Ray actors, beside one in this process's memory, and adds its rows."""
    import ray

    memory = RolloutCache()
    step.store(memory)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # short: Ray's sockets are in it
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100_000_000 + 6 * step.num_bytes,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        try:
            writer = Writer()
            cache = RolloutCache(
                store=RayStore("benchmarks/cache", num_actors=num_actors), writer=writer
            )
            step.store(cache)
            step.check(step.lookup(cache))

            def store_and_wait() -> None:
                step.store(cache)
                cache.flush()

            def timed(
                function: Callable[[], object], setup: Callable[[], object] | None = None
            ) -> Timing:
                return measure(function, repeats=repeats, setup=setup)

            shape = {
                "actors": num_actors,
                "rollouts": len(step.keys),
                "tokens": step.rollouts.response_ids.numel(),
            }
            in_memory = {"in memory": timed(lambda: step.store(memory))}
            results.add(
                "store in actors", shape=shape, timing=timed(store_and_wait), peers=in_memory
            )
            handed_over = timed(lambda: step.store(cache), cache.flush)
            results.add("hand over", shape=shape, timing=handed_over)
            in_memory = {"in memory": timed(lambda: step.lookup(memory))}
            cache.flush()
            looked_up = timed(lambda: step.lookup(cache))
            results.add("lookup in actors", shape=shape, timing=looked_up, peers=in_memory)
            if cache.stats.corrupt or cache.stats.misses or cache.stats.evictions:
                sys.exit(f"expected hits only, got {cache.stats}")
            writer.close()
        finally:
            ray.shutdown()


def run(results: Results, step: Step, folder: Path, repeats: int) -> None:
    """Measures everything and adds the rows."""
    cache, loaded, path = RolloutCache(), RolloutCache(), folder / "cache"
    peer = TensorFile(folder / "step.pt", step)
    step.store(cache)
    cache.save(path)
    loaded.load(path)
    for filled in (cache, loaded):
        step.check(step.lookup(filled))
    peer.save()
    peer.check()

    def timed(function: Callable[[], object]) -> Timing:
        return measure(function, repeats=repeats)

    def add(op: str, function: Callable[[], object], peers: dict[str, Timing], **more: Any) -> None:
        results.add(
            op,
            shape={"rollouts": len(step.keys), "tokens": step.rollouts.response_ids.numel()},
            timing=timed(function),
            peers=peers,
            peak_extra=peak_extra_bytes(function),
            **more,
        )

    torch_save = timed(peer.save)
    torch_save_flushed = timed(lambda: peer.save(flush=True))
    torch_load = timed(peer.load)
    moved = 2 * step.num_bytes  # each byte read and written
    add("store", lambda: step.store(cache), {"torch.save": torch_save}, bytes_moved=moved)
    add("lookup", lambda: step.lookup(cache), {"torch.load": torch_load}, bytes_moved=moved)
    add(
        "save",
        lambda: cache.save(path),
        {"torch.save": torch_save, "torch.save, fsync": torch_save_flushed},
        file_bytes=path.stat().st_size,
        peer_file_bytes=peer.path.stat().st_size,
    )
    add("load", lambda: loaded.load(path), {"torch.load": torch_load})
    if cache.stats.corrupt or cache.stats.misses or cache.stats.evictions:
        sys.exit(f"expected hits only, got {cache.stats}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="of the files; a temporary one if left out")
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument(
        "--ray", type=int, metavar="N", help="measure a store in N Ray actors (cache_ray.json)"
    )
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    num_prompts, repeats = (16, 1) if args.quick else (1024, args.repeats)
    bandwidth = (lambda: copy_bandwidth(1 << 24)) if args.quick else copy_bandwidth
    results = Results("cache" if args.ray is None else "cache_ray", args.out, bandwidth)
    step = Step.make(num_prompts)
    if args.ray is not None:
        run_in_actors(results, step, args.ray, repeats)
    else:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            run(results, step, Path(folder), repeats)
            run_on_disk(results, step, Path(folder), repeats)
    results.write()


if __name__ == "__main__":
    main()
