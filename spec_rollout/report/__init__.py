"""HTML report of one or several runs: `write_report(load_runs([...]), path)`."""

from __future__ import annotations

from spec_rollout.report.load import Run, find_runs, load_run
from spec_rollout.report.page import render_page, write_report

__all__ = ["Run", "find_runs", "load_run", "render_page", "write_report"]
