"""Writes the result tables of README.md from benchmarks/results/*.json.

Between `<!-- begin: NAME -->` and `<!-- end: NAME -->` stands the table of
benchmarks/results/NAME.json, and between those of `gpu_NAME` the kernel table of
benchmarks/results/NAME/gpu_*.json. `--check` changes nothing and exits with 1 if a table is not
what its file gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- begin: (?P<name>[\w-]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(content: Mapping[str, Any]) -> str:
    """Where the figures come from, in one line."""
    env = content["environment"]
    gpus = ", ".join(gpu["name"] for gpu in env.get("gpus") or []) or "no GPU"
    isa = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    best = next((name for flag, name in isa.items() if flag in env["isa"]), "no AVX2")
    commit = (env.get("commit") or "unknown")[:10] + (" + changes" if env.get("dirty") else "")
    facts = [
        f"{env['cpu']} ({best}), {env['cores']} cores",
        *([f"{env['threads']} threads"] if env.get("threads") else []),
        gpus,
        f"torch {env['packages']['torch']}",
        f"Python {env['python']}",
        *([env["native"]["compiler"]] if env.get("native") else []),
        f"commit {commit}",
        content["date"][:10],
    ]
    return f"{', '.join(facts)}; `{content['command']}`"


def seconds(value: float) -> str:
    """With a unit that leaves one to three digits before the point."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def size(num_bytes: float) -> str:
    """In the binary unit that leaves at least one before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    raise AssertionError


def speedup(value: float) -> str:
    """Bold where it is one."""
    return f"**{value:.3g}x**" if value > 1 else f"{value:.3g}x"


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
    copy = content["copy_bandwidth_gb_per_s"]
    return f"{table}\n\nCopy bandwidth in the same run: {copy} GB/s (read and written)."


def _demo_cells(run: Mapping[str, Any]) -> list[str]:
    def change(split: str) -> str:
        before, after = run["accuracy_before"].get(split), run["accuracy_after"].get(split)
        return "" if before is None or after is None else f"{before:.1%} → {after:.1%}"

    return [
        f"{run['rollout_seconds']:.1f} s",
        f"{run['verification_seconds']:.1f} s",
        f"**{run['effective_speedup']:.2f}x**",
        f"{run['generated_tokens']:,} of {run['response_tokens']:,}",
        f"{run['reused_fraction']:.1%}",
        f"{run['fully_reused_fraction']:.1%}",
        change("train"),
        change("heldout"),
    ]


_DEMO_HEADER = [
    "rollouts",
    "of it verification",
    "effective speed-up",
    "generated tokens",
    "reused tokens",
    "fully reused",
    "accuracy, training prompts",
    "accuracy, held-out prompts",
]


def demo_table(content: Mapping[str, Any]) -> str:
    """`summary.json` of the demo."""
    rows = [[name, *_demo_cells(run)] for name, run in content["runs"].items()]
    table = markdown_table(["run", *_DEMO_HEADER], rows)
    notes = [
        f"`{name}` against the same run with the cache off: {same['identical']:,} of "
        f"{same['total']:,} rollouts are the same, token for token."
        for name in ("coupled", "both")
        if (same := content.get(f"{name}_equals_off")) is not None
    ]
    return "\n\n".join([table, *notes])


def demo_seeds_table(content: Mapping[str, Any]) -> str:
    """The demo over several seeds: a line per run and seed."""
    rows = [
        [name, str(summary["seed"]), *_demo_cells(run)]
        for name in content["summaries"][0]["runs"]
        for summary in content["summaries"]
        for run in [summary["runs"][name]]
    ]
    return markdown_table(["run", "seed", *_DEMO_HEADER], rows)


# What the GPU table shows: results file, op, and what of its shape and dtype tells the row from
# others.
_GPU_ROWS: Sequence[tuple[str, str, Mapping[str, Any]]] = (
    *(
        ("gpu_logits", op, {"rows": 4096, "vocab": 151_936, "dtype": "bfloat16", **more})
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


def gpu_table(folder: Path) -> str:
    """The kernels on one GPU, from `folder`/gpu_*.json; a row without a figure says so."""
    files: dict[str, Mapping[str, Any]] = {}
    for name in ("gpu_logits", "gpu_packed", "gpu_calls"):
        path = folder / f"{name}.json"
        if path.is_file():
            files[name] = json.loads(path.read_text(encoding="utf-8"))

    def cells(file: str, op: str, wanted: Mapping[str, Any]) -> list[str]:
        size = ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in wanted.values())
        for row in files.get(file, {}).get("rows", ()):
            known = {**(row.get("shape") or {}), "dtype": row.get("dtype")}
            if row["op"] == op and all(known.get(k) == v for k, v in wanted.items()):
                break
        else:
            return [f"`{op}`", size, "not measured on a GPU yet", "", "", ""]
        share = row.get("share_of_copy_bandwidth")
        by_speed = sorted((row.get("peers") or {}).items(), key=lambda peer: peer[1]["speedup"])
        against = [f"{name} {speedup(peer['speedup'])}" for name, peer in by_speed]
        return [
            f"`{op}`",
            size,
            seconds(row["seconds"]["p50"]),
            f"{row['gb_per_s']:,.0f}" if "gb_per_s" in row else "",
            "" if share is None else f"{share:.0%}",
            ", ".join(against),
        ]

    header = ["op", "size", "median", "GB/s", "of copy bandwidth", "faster than"]
    table = markdown_table(header, [cells(*row) for row in _GPU_ROWS])
    notes = [f"<sub>{provenance(content)}</sub>" for content in files.values()]
    return "\n\n".join([table, *notes])


def rollout_table(content: Mapping[str, Any]) -> str:
    """A file of bench_rollout.py: one line per share of accepted tokens."""
    rows = {(row["strategy"], row["share"]): row for row in content["rows"]}

    def cell(strategy: str, share: float | None) -> str:
        row = rows.get((strategy, share))
        if row is None:
            return ""
        return f"{seconds(row['seconds']['p50'])}, {row['engine_steps']} steps"

    def quotient(share: float, peer: str) -> str:
        wall = rows["inflight", share]["paired"].get(peer)
        return "" if wall is None else f"{wall['wall']:.2f}x"

    shares = [share for strategy, share in rows if strategy == "inflight"]
    strategies = ("two_pass", "inflight", "floor")
    lines = [
        [f"{share:.0%}", cell("vanilla", None), *(cell(name, share) for name in strategies)]
        + [quotient(share, name) for name in ("vanilla", "two_pass", "floor")]
        for share in shares
    ]
    header = [
        "accepted",
        "vanilla",
        *strategies,
        *(f"{n} / inflight" for n in ("vanilla", "two_pass", "floor")),
    ]
    no_key = rows["no key", None]["paired"]["stock"]["wall"]
    return (
        f"{markdown_table(header, lines)}\n\nStock vLLM: {cell('stock', None)}; its time over that "
        "of the same "
        f"requests in vLLM with the plugin: {no_key:.2f}x."
    )


def drafting_table(content: Mapping[str, Any]) -> str:
    """bench_drafting.py: what proposals give, and what finding them costs."""
    replays = [row for row in content["rows"] if row["op"] == "history drafting"]

    def proposed(row: Mapping[str, Any]) -> str | None:
        """What is said of how much was proposed; None for a row that is not shown."""
        most = row["max_tokens"]
        if "min_probability" in row:
            least = row["min_probability"]
            return f"{most}, if likelier than {least}" if least in (0.2, 0.5) else None
        if row["min_match"] == 1 and row["adaptive"] and most == 16:
            return f"{most}, at most twice the match"
        return str(most) if row["min_match"] == 1 and not row["adaptive"] and most == 8 else None

    shown = [
        [
            row["index"],
            row["history"],
            proposed(row),
            f"{row['tokens_per_step']:.2f}",
            f"{row['computed_per_output']:.2f}",
            f"{row['longest_rollout_steps_ratio']:.2f}x",
        ]
        for row in replays
        if proposed(row)
    ]
    header = ["index", "history", "tokens proposed", "tokens per step", "computed per token"]
    table = markdown_table([*header, "fewer steps of the longest rollout"], shown)
    speed = [row for row in content["rows"] if row["op"] != "history drafting"]
    lines = [
        [
            row["op"],
            f"{row['nanoseconds_per_token']:,.0f} ns",
            f"{row['bytes_per_token']:.1f}" if "bytes_per_token" in row else "",
        ]
        for row in speed
    ]
    return f"{table}\n\n{markdown_table(['index', 'per token', 'bytes per token'], lines)}"


def rollout_drafting_table(content: Mapping[str, Any]) -> str:
    """bench_rollout.py --table drafting: seconds and engine steps by mode."""
    lines = []
    for row in content["rows"]:
        vanilla = row.get("peers", {}).get("vanilla")
        computed = row["computed_tokens"] / row["shape"]["response_tokens"]
        lines.append(
            [
                str(row["shape"]["batch"]),
                row["rule"],
                row["mode"],
                f"{row['reused_share']:.0%}",
                seconds(row["seconds"]["p50"]),
                "" if vanilla is None else speedup(vanilla["speedup"]),
                str(row["engine_steps"]),
                f"{computed:.2f}",
            ]
        )
    header = ["requests", "rule", "mode", "tokens reused", "median", "vanilla / mode"]
    return markdown_table([*header, "engine steps", "computed per token"], lines)


_RENDERERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "demo": demo_table,
    "demo_seeds": demo_seeds_table,
    "drafting": drafting_table,
    "rollout_vllm": rollout_table,
    "rollout_vllm_gpu": rollout_table,
    "rollout_vllm_drafting": rollout_drafting_table,
}


def render(text: str, results: Path) -> str:
    """`text` with every block between markers replaced by its table, or by a line that says there
    is no result.

    Raises:
        ValueError: if a begin marker has no end.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name.startswith("gpu_"):  # a folder of results: gpu_h200 is benchmarks/results/h200
            return f"{match[1]}{gpu_table(results / name.removeprefix('gpu_'))}\n{match[3]}"
        path = results / f"{name}.json"
        if not path.is_file():
            return f"{match[1]}*Not measured yet.*\n{match[3]}"
        content = json.loads(path.read_text(encoding="utf-8"))
        table = _RENDERERS.get(name, benchmark_table)(content)
        return f"{match[1]}{table}\n\n<sub>{provenance(content)}</sub>\n{match[3]}"

    if text.count("<!-- begin: ") != len(_BLOCK.findall(text)):
        raise ValueError(
            "README.md: expected an end marker of the same name after every begin marker"
        )
    return _BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    options.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = options.parse_args(argv)
    old = args.readme.read_text(encoding="utf-8")
    try:
        new = render(old, args.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if old == new:
        return 0
    if args.check:
        print("error: README.md: tables are not those of benchmarks/results", file=sys.stderr)
        return 1
    args.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
