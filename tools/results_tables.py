"""Writes the tables of README.md and of pages in docs/ from benchmarks/results.

Between `<!-- begin: NAME -->` and `<!-- end: NAME -->` stands the table of
benchmarks/results/NAME.json, between those of `gpu_NAME` the kernel table of
benchmarks/results/NAME/gpu_*.json, and between those of `..._summary` the README's few lines of
either. `--check` changes nothing and exits with 1 if a table is not what its file gives.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from renderers.ablation import ablation_summary_table, ablation_table
from renderers.kernels import benchmark_table, gpu_summary_table, gpu_table
from renderers.models import families_table
from renderers.real import real_summary_table, real_table
from renderers.rollouts import (
    drafting_table,
    rollout_drafting_table,
    rollout_table,
    serving_table,
    soak_table,
)
from renderers.rounding import rounding_table
from renderers.stores import store_soak_table, torture_table
from renderers.text import provenance
from renderers.trainers import trainers_table
from renderers.training import demo_seeds_table, demo_table

__all__ = ["benchmark_table", "main", "render"]

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / page
    for page in (
        "README.md",
        "docs/acceptance.md",
        "docs/results.md",
        "docs/models.md",
        "docs/reliability.md",
    )
)
_BLOCK = re.compile(r"(<!-- begin: (?P<name>[\w-]+) -->\n).*?(<!-- end: (?P=name) -->)", re.DOTALL)
_SUMMARY = "_summary"

# Of files that are no list of rows, each its own; `benchmark_table` for all others.
_RENDERERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "ablation_small": ablation_table,
    "demo": demo_table,
    "demo_seeds": demo_seeds_table,
    "drafting": drafting_table,
    "model_families": families_table,
    "real": real_table,
    "rollout_vllm": rollout_table,
    "rollout_vllm_small": rollout_table,
    "rollout_vllm_tiny": rollout_table,
    "rollout_vllm_gpu": rollout_table,
    "rollout_vllm_drafting": rollout_drafting_table,
    "rounding": rounding_table,
    "serving": serving_table,
    "serving_http": serving_table,
    "serving_http_real": serving_table,
    "soak": store_soak_table,
    "soak_serving": soak_table,
    "torture": torture_table,
    "trainers": trainers_table,
    "trainers_verl": trainers_table,
}


def table(name: str, results: Path) -> str:
    """What stands between the marks of `name`; a line that says so where there is no result.

    Args:
        results: Folder of the results files.
    """
    file, summary = name.removesuffix(_SUMMARY), name.endswith(_SUMMARY)
    if file.startswith("gpu_"):  # a folder of results: gpu_h200 is benchmarks/results/h200
        folder = results / file.removeprefix("gpu_")
        return gpu_summary_table(folder) if summary else gpu_table(folder)
    path = results / f"{file}.json"
    if not path.is_file():  # a page beside it: benchmarks/results/ablation_small/ablation.json
        path = results / file / "ablation.json"
    if not path.is_file():
        return "*Not measured yet.*"
    content = json.loads(path.read_text(encoding="utf-8"))
    if summary:
        return (real_summary_table if file == "real" else ablation_summary_table)(content)
    shown = _RENDERERS.get(file, benchmark_table)(content)
    return f"{shown}\n\n<sub>{provenance(content)}</sub>"


def render(text: str, results: Path) -> str:
    """`text` with every block between marks replaced by its table.

    Raises:
        ValueError: if a begin mark has no end.
    """
    if text.count("<!-- begin: ") != len(_BLOCK.findall(text)):
        raise ValueError("expected an end mark of the same name after every begin mark")
    return _BLOCK.sub(lambda block: f"{block[1]}{table(block['name'], results)}\n{block[3]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if `--check` finds a table that is not its file's, 2 if a mark is missing."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--check", action="store_true", help="change nothing; 1 if out of date")
    options.add_argument(
        "--page",
        type=Path,
        action="append",
        help="page to write; may be repeated (default: all pages with tables)",
    )
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = options.parse_args(argv)
    changed: dict[Path, str] = {}
    for page in args.page or PAGES:
        old = page.read_text(encoding="utf-8")
        try:
            new = render(old, args.results)
        except ValueError as error:
            print(f"error: {page.name}: {error}", file=sys.stderr)
            return 2
        if new != old:
            changed[page] = new
    for page, text in changed.items():
        if args.check:
            print(f"error: {page.name}: expected the tables of {args.results}", file=sys.stderr)
        else:
            page.write_text(text, encoding="utf-8")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
