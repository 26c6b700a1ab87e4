"""`spec-rollout report`: one page about a run, or about several."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write report.html of runs"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs",
        type=Path,
        nargs="+",
        metavar="RUNDIR",
        help="a run, or a folder of runs; several are compared on one page",
    )
    parser.add_argument(
        "--out", type=Path, help="file to write (default: report.html in the first RUNDIR)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is.

    Raises:
        ValueError: if there is no run in a folder, or the page cannot be written.
    """
    from spec_rollout.report import find_runs, load_run, write_report
    from spec_rollout.runs.outputs import check_outputs

    folders = [path for directory in args.run_dirs for path in find_runs(directory)]
    out = args.out or args.run_dirs[0] / "report.html"
    check_outputs({"--out": out})
    print(write_report([load_run(folder) for folder in folders], out))
    return 0
