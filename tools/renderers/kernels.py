"""Tables of the operations and engines: `_common.Results` files, on CPUs and on a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from renderers.text import markdown_table, origin, provenance, seconds, size, speedup


def benchmark_table(content: Mapping[str, Any]) -> str:
    """A file of `_common.Results`: one line per row and peer."""
    rows = []
    for row in content["rows"]:
        what = [f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
                for key, value in (row.get("shape") or {}).items()]  # fmt: skip
        if row.get("dtype"):
            what.append(row["dtype"])
        share = row.get("share_of_copy_bandwidth")
        extra = row.get("peak_extra_bytes")
        shared = [
            f"`{row['op']}`",
            ", ".join(what),
            seconds(row["seconds"]["p50"]),
            "" if share is None else f"{share:.0%}",
            "" if extra is None else size(extra),
        ]
        for name, peer in (row.get("peers") or {"": None}).items():
            against = ["", ""] if peer is None else [f"{name} ({seconds(peer['seconds']['p50'])})"]
            against += [] if peer is None else [speedup(peer["speedup"])]
            rows.append([*shared, *against])
            shared = [""] * len(shared)
    header = [
        "op",
        "size",
        "median",
        "of copy bandwidth",
        "peak extra memory",
        "against",
        "speed-up",
    ]
    kept = [c for c in range(len(header)) if any(row[c] for row in rows)]
    table = markdown_table([header[c] for c in kept], [[row[c] for c in kept] for row in rows])
    notes = [
        f"`{row['op']}`: {row['bytes_per_token']} bytes a token beyond ids and log-probs."
        for row in content["rows"]
        if "bytes_per_token" in row
    ]
    copy = content["copy_bandwidth_gb_per_s"]
    notes.append(f"Copy bandwidth in the same run: {copy} GB/s (read and written).")
    return f"{table}\n\n" + "\n".join(notes)


# A row of the GPU tables: results file, op, and what of its shape and dtype tells it from others.
GpuRow = tuple[str, str, Mapping[str, Any]]
_LOGITS = {"rows": 4096, "vocab": 151_936, "dtype": "bfloat16"}
GPU_ROWS: Sequence[GpuRow] = (
    *(
        ("gpu_logits", op, {**_LOGITS, **more})
        for op, more in (
            ("token_logprobs", {}),
            *(
                (f"verify_prefix, {rule}", {"accepted": accepted})
                for rule in ("lenient", "coupled")
                for accepted in ("0%", "50%", "100%")
            ),
            ("sample_tokens", {}),
            ("sample_tokens, top_k 50", {}),
            ("sample_tokens, top_p 0.95", {}),
        )
    ),
    ("gpu_packed", "accept_prefix, packed", {"batch": 8192}),
    ("gpu_packed", "splice_kv, rows to rows", {}),
    ("gpu_packed", "splice_kv, rows to blocks", {}),
    ("gpu_packed", "assemble, split, into out", {"batch": 8192}),
    *(
        ("gpu_calls", f"call of {op}, empty batch", {})
        for op in (
            "token_logprobs",
            "accept_prefix",
            "verify_prefix",
            "sample_tokens",
            "splice_kv, 2 caches",
            "assemble, split",
            "torch.add (for scale)",
        )
    ),
)
# Those of the README, and what its readers should know about each.
GPU_SUMMARY_ROWS: Sequence[tuple[GpuRow, str]] = (
    (("gpu_logits", "token_logprobs", _LOGITS), "log-probs of 4,096 tokens"),
    (
        ("gpu_logits", "verify_prefix, lenient", {**_LOGITS, "accepted": "50%"}),
        "256 drafts of 15, 7 kept",
    ),
    (
        ("gpu_logits", "verify_prefix, coupled", {**_LOGITS, "accepted": "100%"}),
        "256 drafts of 15, all kept",
    ),
    (("gpu_packed", "splice_kv, rows to blocks", {}), "accepted prefixes into a paged cache"),
)
_GPU_FILES = ("gpu_logits", "gpu_packed", "gpu_calls")
_NOT_MEASURED = "not measured on a GPU yet"


def _gpu_files(folder: Path) -> dict[str, Mapping[str, Any]]:
    paths = {name: folder / f"{name}.json" for name in _GPU_FILES}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.is_file()
    }


def _gpu_row(files: Mapping[str, Mapping[str, Any]], wanted: GpuRow) -> Mapping[str, Any] | None:
    """The measured row, None if there is none."""
    file, op, shape = wanted
    for row in files.get(file, {}).get("rows", ()):
        known = {**(row.get("shape") or {}), "dtype": row.get("dtype")}
        if row["op"] == op and all(known.get(key) == value for key, value in shape.items()):
            return row
    return None


def _share_of_copy(row: Mapping[str, Any]) -> str:
    share = row.get("share_of_copy_bandwidth")
    return "" if share is None else f"{share:.0%}"


def gpu_table(folder: Path) -> str:
    """The kernels on one GPU, from `folder`/gpu_*.json; a row without a figure says so."""
    files = _gpu_files(folder)

    def cells(wanted: GpuRow) -> list[str]:
        _, op, shape = wanted
        size = ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in shape.values())
        row = _gpu_row(files, wanted)
        if row is None:
            return [f"`{op}`", size, _NOT_MEASURED, "", "", ""]
        by_speed = sorted((row.get("peers") or {}).items(), key=lambda peer: peer[1]["speedup"])
        return [
            f"`{op}`",
            size,
            seconds(row["seconds"]["p50"]),
            f"{row['gb_per_s']:,.0f}" if "gb_per_s" in row else "",
            _share_of_copy(row),
            ", ".join(f"{name} {speedup(peer['speedup'])}" for name, peer in by_speed),
        ]

    header = ["op", "size", "median", "GB/s", "of copy bandwidth", "faster than"]
    table = markdown_table(header, [cells(row) for row in GPU_ROWS])
    shown = [row for wanted in GPU_ROWS if (row := _gpu_row(files, wanted)) is not None]
    absent: dict[str, list[str]] = {}  # by what and why: the ops that it was not timed for
    for row in shown:
        for name, why in (row.get("absent") or {}).items():
            ops = absent.setdefault(f"{name} ({why})", [])
            ops += [] if f"`{row['op']}`" in ops else [f"`{row['op']}`"]
    notes = []
    if absent:
        said = "; ".join(f"{what} for {', '.join(ops)}" for what, ops in absent.items())
        notes.append(f"Not timed: {said}.")
    notes += [f"<sub>{provenance(content)}</sub>" for content in files.values()]
    return "\n\n".join([table, *notes])


def gpu_summary_table(folder: Path) -> str:
    """A handful of rows of `gpu_table`, each against the fastest that is not ours, and against ours
    in Triton."""
    files = _gpu_files(folder)

    def cells(wanted: GpuRow, what: str) -> list[str]:
        row = _gpu_row(files, wanted)
        if row is None:
            return [f"`{wanted[1]}`", what, _NOT_MEASURED, "", ""]
        peers = row.get("peers") or {}
        by_speed = sorted(peers, key=lambda name: peers[name]["speedup"])
        others = [name for name in by_speed if not name.startswith("our ")]
        ours = [name for name in by_speed if name.startswith("our ")]
        against = ", ".join(
            f"{name} {speedup(peers[name]['speedup'])}" for name in [*others[:1], *ours]
        )
        median = seconds(row["seconds"]["p50"])
        return [f"`{wanted[1]}`", what, median, _share_of_copy(row), against]

    header = ["op", "work", "median", "of copy bandwidth", "fastest of others; ours"]
    table = markdown_table(header, [cells(row, what) for row, what in GPU_SUMMARY_ROWS])
    return "\n\n".join([table, *([f"<sub>{origin(files.values())}</sub>"] if files else [])])
