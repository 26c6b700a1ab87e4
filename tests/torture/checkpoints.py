"""Checkpoints that refer to a disk store, killed while they are written."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from children import Child, run
from faults import NUM_KEYS, Outcome, Say, num_wrong, steps_found, store_step

from spec_rollout.cache import DiskStore, RolloutCache
from spec_rollout.train.checkpoint import list_checkpoints, save_checkpoint
from spec_rollout.train.manifest import check_content
from spec_rollout.train.run_store import read_reference
from spec_rollout.train.state import TrainState, load_state


class Weights(torch.nn.Linear):
    """The least that a checkpoint can be made of."""

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), Path(folder) / "weights.pt")


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text(json.dumps({}))


def save(root: Path, store: DiskStore, model: Any, optimizer: Any, step: int) -> None:
    save_checkpoint(
        root,
        TrainState(step, "data"),
        model=model,
        tokenizer=NoTokenizer(),
        optimizer=optimizer,
        cache=RolloutCache(store=store),
        store=store,
        keep_last=2,
    )


def first_optimizer() -> None:
    """Has torch import what a process's first optimizer wants, seconds long: once for all children,
    which are forks of this process."""
    torch.optim.AdamW(Weights(1, 1).named_parameters())


def kill_while_saving(folder: Path, times: int, seed: int = 0) -> Outcome:
    """SIGKILL at random moments of steps that store and then write a checkpoint.

    Each time the newest checkpoint is whole, and the store goes back to the step that it says.
    """
    outcome, rng = Outcome("kill -9 while checkpointing"), random.Random(seed)
    torch.set_num_threads(1)
    first_optimizer()
    root, place = folder / "checkpoints", folder / "store"
    next_step = 0
    for _ in range(times):
        start = next_step

        def work(say: Say, start: int = start) -> None:
            model = Weights(4, 4)
            optimizer = torch.optim.AdamW(model.named_parameters())
            with DiskStore(place) as store:
                for step in range(start, start + 10_000):
                    store_step(store, step)
                    save(root, store, model, optimizer, step)
                    say(step)

        child = Child(work)
        child.wait_for_word()
        time.sleep(rng.random() * 0.05)
        child.kill()
        killed = child.end()
        last = max([start - 1, *killed.said])

        def check(say: Say, last: int = last) -> None:
            found = list_checkpoints(root)
            for checkpoint in found:
                check_content(checkpoint)
            newest = found[-1]
            step = load_state(newest).step
            reference = read_reference(newest)
            assert reference is not None
            with DiskStore(place, create=False) as store:
                marks = store.marks()
                expected = [read_reference(checkpoint) for checkpoint in found]
                assert {r[1] for r in expected if r} <= set(marks), "a checkpoint has no mark"
                store.roll_back(reference[1])
                there = steps_found(store)
            # Said steps have their checkpoint; the next one may have it, too.
            assert step in (last, last + 1), f"said {last}, the newest checkpoint is of {step}"
            say([step, num_wrong(there, step)])

        ended = run(check)
        step, lost = ended.said[0] if ended.said else (last, NUM_KEYS)
        outcome.count(ended, lost, killed)
        next_step = step + 1
    shutil.rmtree(folder)
    return outcome
