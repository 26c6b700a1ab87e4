"""What every benchmark shares: timing, memory, the machine's own copy bandwidth, and the results
file.

A benchmark checks its results against a reference first, then calls `measure` on each contender in
the same process with the same threads, and `Results.write()` at the end:

    results = Results("ops_cpu")
    ours = measure(lambda: ops.token_logprobs(logits, ids))
    results.add("token_logprobs", shape={"rows": 256, "vocab": 151936}, dtype="bfloat16",
                timing=ours, bytes_moved=logits.nbytes, peers={"log_softmax_gather": theirs})
    results.write()
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec_rollout.runs.environment import environment, git_commit

ROOT = Path(__file__).resolve().parents[1]
RESULTS_DIR = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall seconds of one call over `repeats` calls."""

    p20: float
    p50: float
    p80: float
    repeats: int

    @property
    def median(self) -> float:
        return self.p50


def measure(
    function: Callable[[], object],
    *,
    repeats: int = 15,
    warmup: int = 2,
    min_seconds: float = 0.0,
    setup: Callable[[], object] | None = None,
    calls_per_repeat: int = 1,
) -> Timing:
    """Times `function`.

    Args:
        function: What is timed; its result is dropped after the clock stops.
        repeats: Timed samples, at least 1.
        warmup: Untimed calls first (first-touch of memory, thread start-up).
        min_seconds: Go on sampling until this much time was spent in `function`.
        setup: Called untimed before each sample (to evict caches or restore an argument changed in
            place).
        calls_per_repeat: Calls within one sample, for calls of microseconds; the sample is divided
            by it.
    """
    if repeats < 1 or calls_per_repeat < 1:
        raise ValueError(
            f"repeats, calls_per_repeat: expected >= 1, got {repeats}, {calls_per_repeat}"
        )
    for _ in range(warmup):
        if setup is not None:
            setup()
        function()
    samples: list[float] = []
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        while len(samples) < repeats or sum(samples) * calls_per_repeat < min_seconds:
            if setup is not None:
                setup()
            start = time.perf_counter()
            for _ in range(calls_per_repeat):
                result = function()
            samples.append((time.perf_counter() - start) / calls_per_repeat)
            del result
    finally:
        if gc_was_enabled:
            gc.enable()
    p20, p50, p80 = np.percentile(samples, [20, 50, 80]).tolist()
    return Timing(p20, p50, p80, len(samples))


def copy_bandwidth(num_bytes: int = 1 << 29) -> float:
    """Measured bytes per second of a large copy (read + written), with torch's current threads."""
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.zeros(num_bytes, dtype=torch.uint8)
    timing = measure(lambda: target.copy_(source), repeats=9)
    return 2 * num_bytes / timing.p20


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_extra_bytes(function: Callable[[], object]) -> int | None:
    """How far resident memory rises above its level before the call, results included; None if
    unknown here.

    Resolution is that of the kernel's accounting (some 100 KiB): for calls that handle megabytes
    and more.
    """
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from now
        before = _status_bytes("VmRSS")
        result = function()
        peak = _status_bytes("VmHWM")
    except OSError:
        return None
    del result
    return max(0, peak - before)


class Results:
    """Rows of one benchmark and the circumstances they were measured in."""

    def __init__(
        self,
        name: str,
        directory: Path = RESULTS_DIR,
        bandwidth: Callable[[], float] | None = None,
    ) -> None:
        """`bandwidth` measures bytes per second of a copy; `copy_bandwidth` if left out."""
        self.name = name
        self.directory = directory
        self._bandwidth = bandwidth or copy_bandwidth
        self.rows: list[dict[str, Any]] = []
        # Before measuring: a commit made meanwhile is not what ran.
        self._environment = {**environment(), **git_commit(ROOT)}
        self._environment["threads"] = torch.get_num_threads()
        self._environment["omp_num_threads"] = os.environ.get("OMP_NUM_THREADS")
        self.copy_bandwidth = self._bandwidth()

    def add(
        self,
        op: str,
        *,
        timing: Timing,
        shape: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        bytes_moved: int | None = None,
        peak_extra: int | None = None,
        peers: Mapping[str, Timing] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Appends and prints one row.

        Args:
            bytes_moved: Bytes the job must read and write at least, counted by hand; gives GB/s and
                the share of the copy bandwidth.
            peers: Other ways to do the same job; gives `speedup` = their median over ours for each.
            more: Anything else worth keeping, JSON-serialisable.
        """
        row: dict[str, Any] = {"op": op, **({"shape": dict(shape)} if shape else {})}
        if dtype is not None:
            row["dtype"] = dtype
        row["seconds"] = asdict(timing)
        if bytes_moved is not None:
            row["bytes_moved"] = bytes_moved
            row["gb_per_s"] = round(bytes_moved / timing.p50 / 1e9, 3)
        if peak_extra is not None:
            row["peak_extra_bytes"] = peak_extra
        if peers:
            row["peers"] = {
                name: {"seconds": asdict(peer), "speedup": round(peer.p50 / timing.p50, 3)}
                for name, peer in peers.items()
            }
        row.update(more)
        self.rows.append(row)
        ratios = ", ".join(f"{p['speedup']:.2f}x {n}" for n, p in row.get("peers", {}).items())
        print(f"{op:<28} {timing.p50 * 1e3:10.3f} ms  {ratios}", flush=True)
        return row

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "command": shlex.join(["python", *_relative(sys.argv)]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": self._environment,
            "copy_bandwidth_gb_per_s": round(self.copy_bandwidth / 1e9, 2),
            "rows": self.rows,
        }

    def write(self) -> Path:
        """Writes `<directory>/<name>.json`, whole or not at all.

        The copy bandwidth is measured once more: a disturbance at the start must not flatter the
        shares of it.
        """
        self.copy_bandwidth = max(self.copy_bandwidth, self._bandwidth())
        for row in self.rows:
            if "gb_per_s" in row:
                share = row["gb_per_s"] * 1e9 / self.copy_bandwidth
                row["share_of_copy_bandwidth"] = round(share, 4)
        path = self.directory / f"{self.name}.json"
        write_json(path, self.as_dict())
        print(f"wrote {path}")
        return path


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file in one piece; NaN and infinity are refused, as JSON has none."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _relative(argv: list[str]) -> list[str]:
    """The command line with paths of this checkout relative to it, and of others only their
    name."""
    shown = []
    for arg in argv:
        path = Path(arg)
        if path.is_absolute():
            arg = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        shown.append(arg)
    return shown


def vllm_environment(variable: str) -> dict[str, str]:
    """Variables of a process with vLLM's engine in it; `variable` is SPEC_ROLLOUT's value."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        # On a CPU vLLM's compiler gains nothing for a small model.
        **({} if torch.cuda.is_available() else {"TORCH_COMPILE_DISABLE": "1"}),
        "SPEC_ROLLOUT": variable,
    }


def counted_steps() -> dict[str, int]:
    """Counts what vLLM's schedulers of this process give out from now on: `steps` with tokens, and
    `computed` tokens.

    The scheduler is the same under both model runners: on a GPU stock runs on another than V1's
    plugin.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    counts = {"steps": 0, "computed": 0}
    original = Scheduler.schedule

    def schedule(self: Any, *args: Any, **kw: Any) -> Any:
        output = original(self, *args, **kw)
        counts["steps"] += output.total_num_scheduled_tokens > 0
        counts["computed"] += output.total_num_scheduled_tokens
        return output

    Scheduler.schedule = schedule
    return counts


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options all benchmarks have: `--threads`, `--out`, `--quick`."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--threads", type=int, help="torch threads; torch's choice if left out")
    options.add_argument("--out", type=Path, default=RESULTS_DIR, help="folder of the JSON file")
    options.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    return options
