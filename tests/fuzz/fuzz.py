"""Coverage-guided fuzzing of every parser: `make fuzz`, or

    python tests/fuzz/fuzz.py --seconds 60 --targets wire,history

A target at a time, in a process of its own (atheris: libFuzzer for Python), from its seeds and
tests/fuzz/corpus/TARGET. What reaches code that nothing there reached is added to that folder; an
input that makes a target raise is left in build/fuzz/TARGET, to be tried again with

    python tests/fuzz/fuzz.py --targets TARGET --input build/fuzz/TARGET/crash-...

Prints a line per target (seconds, inputs tried, inputs kept); exit status 1 if one raised.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "fuzz"
CORPUS = HERE / "corpus"
# Larger inputs are slower, and reach nothing that these do not.
_MAX_BYTES = 2048


def fuzz_one(name: str, options: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["spec_rollout", "parsers", "tomllib", "json"]):
        import parsers

    atheris.Setup([sys.argv[0], *options], parsers.TARGETS[name])
    atheris.Fuzz()


def _libfuzzer(name: str, *options: str) -> Any:
    command = [sys.executable, __file__, "--one", name, *options]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def steps_of(target: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """Which line of the package followed which while a target ran."""
    steps: set[tuple[str, int, int]] = set()

    def local(frame: FrameType, event: str, _: object) -> Any:
        nonlocal last
        if event == "line":
            steps.add((frame.f_code.co_filename, last, frame.f_lineno))
            last = frame.f_lineno
        return local

    def calls(frame: FrameType, event: str, _: object) -> Any:
        return local if "spec_rollout" in frame.f_globals.get("__name__", "") else None

    last = 0
    sys.settrace(calls)
    try:
        target(data)
    except Exception:  # found by the fuzzer before, and told
        return set()
    finally:
        sys.settrace(None)
    return steps


def keep_new(target: Callable[[bytes], None], found: Path, kept: Path) -> int:
    """Adds to a corpus what reaches steps that nothing in it reaches, the shortest first; how many
    were added."""
    known: set[tuple[str, int, int]] = set()
    for path in kept.iterdir():
        known |= steps_of(target, path.read_bytes())
    added = 0
    for path in sorted(found.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        new = steps_of(target, path.read_bytes()) - known
        if new:
            known |= new
            (kept / path.name).write_bytes(path.read_bytes())
            added += 1
    return added


def run_target(
    name: str, target: Callable[[bytes], None], seeds: list[bytes], seconds: int
) -> bool:
    """Fuzzes a target, prints its line, adds to its corpus; whether it raised nothing."""
    found, kept = WORK / name, CORPUS / name
    for folder in (found / "corpus", kept):
        folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (found / "corpus" / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    before = len(list(kept.iterdir()))
    done = _libfuzzer(
        name,
        f"-max_total_time={seconds}",
        f"-artifact_prefix={found}/",
        f"-max_len={_MAX_BYTES}",
        "-timeout=20",
        "-print_final_stats=1",
        str(found / "corpus"),
        str(kept),
    )
    tried = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    new = keep_new(target, found / "corpus", kept)
    print(
        f"{name:15} {seconds:4} s  {int(tried[1]) if tried else 0:9,} inputs  {new} added to "
        f"{before}  {'ok' if done.returncode == 0 else 'RAISED'}",
        flush=True,
    )
    if done.returncode != 0:
        print(done.stderr[-4000:], flush=True)
    return done.returncode == 0


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
    import parsers

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=int, default=60, help="of each target")
    options.add_argument("--targets", default=",".join(parsers.TARGETS))
    options.add_argument("--input", type=Path, help="try this file only")
    args = options.parse_args()
    names = args.targets.split(",")
    if unknown := set(names) - set(parsers.TARGETS):
        options.error(
            f"--targets: expected some of {', '.join(parsers.TARGETS)}, got {min(unknown)}"
        )
    if args.input is not None:
        for name in names:
            parsers.TARGETS[name](args.input.read_bytes())
        return 0
    seeds = parsers.seeds()
    return not all(
        [run_target(name, parsers.TARGETS[name], seeds[name], args.seconds) for name in names]
    )


if __name__ == "__main__":
    sys.exit(main())
