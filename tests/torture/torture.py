"""Every fault by the hundred: `make torture`.

    python tests/torture/torture.py --kills 200 --out benchmarks/results

Prints a line per fault (tried, survived, lost) and writes torture.json. Exit status 1 if anything
was lost, or not survived.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import checkpoints
import faults

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from _common import Results, copy_bandwidth


def outcomes(folder: Path, kills: int, seed: int) -> Iterator[faults.Outcome]:
    """All faults, one after another."""
    yield faults.kill_while_storing(folder / "store", kills, seed)
    yield checkpoints.kill_while_saving(folder / "checkpoints", kills, seed)
    yield faults.kill_while_compacting(folder / "compact", kills, seed)
    yield from faults.damage(folder, kills, seed)
    yield faults.full_disk(folder, max(1, kills // 10), seed)
    yield faults.two_writers(folder / "two", 2 * kills)
    yield faults.readers_while_compacting(folder / "readers", kills)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="tries of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of torture.json; default: not written")
    args = parser.parse_args()
    done = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in outcomes(Path(folder), args.kills, args.seed):
            print(outcome.line(), flush=True)
            done.append(outcome)
    if args.out is not None:
        results = Results("torture", args.out, lambda: copy_bandwidth(1 << 24))
        results.rows += [asdict(outcome) for outcome in done]
        results.write()
    return any(outcome.lost or outcome.survived < outcome.tried for outcome in done)


if __name__ == "__main__":
    sys.exit(main())
