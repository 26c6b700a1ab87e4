"""Every fault by the hundred: `make torture`.

    python tests/torture/torture.py --kills 200 --out benchmarks/results
    python tests/torture/torture.py --only checkpointing,training     # some of them

Prints a line per fault (tried, survived, lost) as it goes, and writes torture.json. Exit status 1
if anything was lost, or not survived.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import checkpoints
import damage
import engine_deaths
import kills
import shared_rollouts
import together
import training
from _common import Results, copy_bandwidth
from faults import Outcome


def all_faults(times: int, seed: int) -> Mapping[str, Callable[[Path], Iterable[Outcome]]]:
    """What is tried in a folder of its own, by name."""
    few = max(1, times // 10)
    return {
        "storing": lambda at: [kills.kill_while_storing(at, times, seed)],
        "checkpointing": lambda at: [checkpoints.kill_while_saving(at, times, seed)],
        "compacting": lambda at: [kills.kill_while_compacting(at, times, seed)],
        "training": lambda at: [training.kill_while_training(at, few, seed)],
        "damage": lambda at: damage.damage(at, times, seed),
        "full": lambda at: [damage.full_disk(at, few, seed)],
        "writers": lambda at: [together.two_writers(at, 2 * times)],
        "runs": lambda at: [together.two_runs(at, times, seed)],
        "readers": lambda at: [together.readers_while_compacting(at, times)],
        "clocks": lambda at: [together.clocks_that_jump(at, few, seed)],
        "sharing": lambda at: [
            shared_rollouts.kill_while_sharing(at / "killed", times, seed),
            shared_rollouts.full_folder(at / "full", times, seed),
            shared_rollouts.two_sharing(at / "two", 2 * times),
        ],
        "engine": lambda _: [engine_deaths.kill_engines(max(1, times // 50), seed)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="tries of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of faults, separated by commas")
    parser.add_argument("--out", type=Path, help="folder of torture.json; default: not written")
    args = parser.parse_args()
    faults = all_faults(args.kills, args.seed)
    only = [name for name in args.only.split(",") if name] or list(faults)
    if unknown := set(only) - set(faults):
        parser.error(f"--only: expected some of {', '.join(faults)}, got {min(unknown)}")
    results = None
    if args.out is not None:
        results = Results("torture", args.out, lambda: copy_bandwidth(1 << 24))
    done: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in only:
            start = time.perf_counter()
            for outcome in faults[name](Path(folder) / name):
                print(outcome.line(), flush=True)
                done.append(outcome)
            print(f"    {time.perf_counter() - start:.0f} s", flush=True)
            if results is not None:  # each time: what was tried is kept
                results.rows = [asdict(outcome) for outcome in done if outcome.tried]
                results.write()
    return any(outcome.lost or outcome.survived < outcome.tried for outcome in done)


if __name__ == "__main__":
    sys.exit(main())
