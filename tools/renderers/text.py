"""How figures are written: Markdown tables, units, and where a figure comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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
    facts = [
        f"{env['cpu']} ({best}), {env['cores']} cores",
        *([f"{env['threads']} threads"] if env.get("threads") else []),
        gpus,
        f"torch {env['packages']['torch']}",
        f"Python {env['python']}",
        *([env["native"]["compiler"]] if env.get("native") else []),
        f"commit {_commit(env)}",
        content["date"][:10],
    ]
    return f"{', '.join(facts)}; `{content['command']}`"


def origin(contents: Iterable[Mapping[str, Any]]) -> str:
    """The few words of `provenance` that a small table has room for."""
    known = list(contents)
    environments = [content["environment"] for content in known]

    def all_of(values: Iterable[str]) -> str:
        return " and ".join(dict.fromkeys(values))

    def hardware(env: Mapping[str, Any]) -> str:
        gpus = ", ".join(gpu["name"] for gpu in env.get("gpus") or [])
        return gpus or f"{env['cpu']}, {env['cores']} cores"

    return ", ".join(
        [
            all_of(hardware(env) for env in environments),
            f"torch {all_of(env['packages']['torch'] for env in environments)}",
            f"commit {all_of(_commit(env) for env in environments)}",
            all_of(content["date"][:10] for content in known),
        ]
    )


def _commit(environment: Mapping[str, Any]) -> str:
    changes = " + changes" if environment.get("dirty") else ""
    return f"{(environment.get('commit') or 'unknown')[:10]}{changes}"


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
