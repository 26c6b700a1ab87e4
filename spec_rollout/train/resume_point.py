"""Where a run is resumed: its newest checkpoint that is whole and fits its metrics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from spec_rollout.config.sections import ConfigError
from spec_rollout.runs.files import CHECKPOINTS, CONFIG, METRICS, SUMMARY, check_steps
from spec_rollout.train.checkpoint import all_checkpoints
from spec_rollout.train.manifest import check_complete, check_content
from spec_rollout.train.state import CheckpointError, load_state


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where to go on.

    Attributes:
        checkpoint: Its folder; None is the beginning.
        passed_over: Newer ones that are not usable.
        notes: Why not, a line each; and that the run begins again, if it does.
    """

    checkpoint: Path | None
    passed_over: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def set_aside(self) -> None:
        """Gives what was passed over another name: these steps are done again."""
        for folder in self.passed_over:
            place = folder.with_name(f"unusable-{folder.name}")
            number = 1
            while place.exists():
                number += 1
                place = folder.with_name(f"unusable-{folder.name}-{number}")
            os.replace(folder, place)


def check_is_run(run_dir: Path) -> None:
    """Raises CheckpointError unless a folder holds a run that can be resumed or begun again."""
    root = run_dir / CHECKPOINTS
    begun = (run_dir / CONFIG).is_file() and not (run_dir / SUMMARY).exists()
    if not begun and not all_checkpoints(root):
        what = "none" if run_dir.is_dir() else "no such folder"
        raise CheckpointError(
            f"resume: expected a run with a checkpoint in {str(root)!r}, got {what}"
        )


def find_resume_point(run_dir: Path) -> ResumePoint:
    """Reads all files of the checkpoint that it finds, and changes nothing.

    A run that was killed before its first checkpoint is begun again.

    Raises:
        CheckpointError: if there are checkpoints and none of them can be used, saying why not.
    """
    check_is_run(run_dir)
    found = all_checkpoints(run_dir / CHECKPOINTS)
    if not found:
        note = f"{run_dir}: there is no checkpoint yet; the run begins again"
        return ResumePoint(None, notes=(note,))
    problems: list[str] = []
    for index in reversed(range(len(found))):
        try:
            check_complete(found[index])
            state = load_state(found[index])
            check_steps(run_dir / METRICS, max(0, state.last_recorded))
            check_content(found[index])
        except (CheckpointError, ConfigError) as error:
            problems.append(str(error))
            continue
        passed_over = tuple(found[index + 1 :])
        notes = tuple(f"{problem}; the checkpoint before it is taken" for problem in problems)
        return ResumePoint(found[index], passed_over, notes)
    raise CheckpointError("; ".join(problems))
