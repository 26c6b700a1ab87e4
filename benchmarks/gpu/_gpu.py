"""Timing on a GPU: CUDA events, a cold L2, the device's own copy bandwidth, and peers that may not
be installed.

`--dry-run` runs the same code on tiny shapes on the CPU and writes nothing unless `--out` is given:
it shows that the scripts work, not how fast anything is.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import RESULTS_DIR, Results, Timing, measure
from results_tables import benchmark_table

_FLUSH_BYTES = 512 << 20  # several times the L2 of any GPU so far
_COPY_BYTES = 1 << 30
_MIN_SAMPLES, _MAX_SAMPLES = 7, 100


@dataclass(frozen=True)
class Bench:
    """Where a script runs and what for.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        seconds: Measuring time per contender.
        out: Folder of the results file; None writes nothing.
    """

    device: str
    seconds: float
    out: Path | None

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def results(self, name: str) -> Results:
        return Results(name, self.out or Path(), bandwidth=self.copy_bandwidth)

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a device-to-device copy."""
        num_bytes = 1 << 20 if self.dry else _COPY_BYTES
        source = torch.ones(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.time(lambda: target.copy_(source)).p20

    def time(self, call: Callable[[], object]) -> Timing:
        """Seconds of one call on the device: warm, but with a cold L2."""
        if self.dry:
            return measure(call, repeats=1, warmup=1)
        for _ in range(3):
            call()
        # Reading evicts as writing does, without leaving dirty lines that the timed call would pay
        # for. It also gives the host the time to enqueue the call, so that launch gaps stay out of
        # the interval.
        flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.float32, device=self.device).fill_(1.0)
        samples: list[float] = []
        while len(samples) < _MIN_SAMPLES or (
            len(samples) < _MAX_SAMPLES and sum(samples) < self.seconds
        ):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()
            start.record()
            call()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        p20, p50, p80 = np.percentile(samples, [20, 50, 80]).tolist()
        return Timing(p20, p50, p80, len(samples))

    def overhead(self, call: Callable[[], object], calls: int = 200) -> Timing:
        """Seconds of host time per call: what Python, checks and the launch cost."""
        if self.dry:
            return measure(call, repeats=1, calls_per_repeat=2)

        def wait() -> None:
            torch.cuda.synchronize()

        return measure(call, repeats=21, warmup=20, setup=wait, calls_per_repeat=calls)

    def free_bytes(self) -> int:
        if self.dry:
            return 1 << 30
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def peers(
    bench: Bench, table: Mapping[str, tuple[int, Callable[[], Callable[[], object]]]]
) -> tuple[dict[str, Timing], dict[str, str]]:
    """(timings, reasons of those that have none).

    Args:
        table: Per peer the device memory it needs in bytes, and a function that imports and checks
            it and returns what is timed. An `ImportError` is "not installed"; any other error is
            kept with its text, and does not end the run: a peer's interface may have changed.
    """
    timings: dict[str, Timing] = {}
    absent: dict[str, str] = {}
    for name, (needed, prepare) in table.items():
        free = bench.free_bytes()
        if needed > free:
            absent[name] = f"needs {needed >> 30} GiB, {free >> 30} GiB are free"
            continue
        try:
            call = prepare()
            timings[name] = bench.time(call)
            del call
        except ImportError:
            absent[name] = "not installed"
        except Exception as error:
            text = str(error).splitlines()
            absent[name] = f"failed: {type(error).__name__}: {text[0][:200] if text else ''}"
    return timings, absent


def slug(device_name: str) -> str:
    """Folder of a GPU's results: "NVIDIA H200" is h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower().replace("nvidia", "")).strip("_")


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="folder; benchmarks/results/<gpu> if left out")
    parser.add_argument("--seconds", type=float, default=0.1, help="measuring time per contender")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on CPU: does it run?")
    return parser


def bench_of(args: argparse.Namespace) -> Bench:
    """Exits with one line where there is no GPU."""
    if args.dry_run:
        return Bench("cpu", 0.0, args.out)
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --dry-run exercises the script without one")
    from spec_rollout.ops import build_info

    if not build_info()["cuda"]:
        sys.exit("error: spec_rollout was built without CUDA; spec-rollout doctor says what to do")
    return Bench("cuda", args.seconds, args.out or RESULTS_DIR / slug(torch.cuda.get_device_name()))


def finish(bench: Bench, results: Results, started: float) -> None:
    """Writes the file and prints the table."""
    if bench.out is not None:
        results.write()
    content: dict[str, Any] = results.as_dict()
    print("A dry run: the figures below say nothing." if bench.dry else "")
    print(benchmark_table(content))
    for row in content["rows"]:
        for name, reason in row.get("absent", {}).items():
            print(f"{row['op']} {row.get('shape', {})}: {name}: {reason}")
    print(f"{results.name}: {len(content['rows'])} rows in {time.perf_counter() - started:.0f} s")
