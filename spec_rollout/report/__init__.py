"""HTML report of one or several runs: `write_report([load_run(folder), ...], path)`."""

from __future__ import annotations

from spec_rollout.report.page import render_page, write_report
from spec_rollout.runs.load import Run, find_runs, load_run

__all__ = ["Run", "find_runs", "load_run", "render_page", "write_report"]
