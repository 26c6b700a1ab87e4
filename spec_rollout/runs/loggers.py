"""A run's curves in TensorBoard and Weights & Biases: the numbers of metrics.jsonl, row by row.

Both are written by their own libraries. A logger that fails, when it starts or at any row, does not
end the run: what it said is printed once, and the rows it has not taken are counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from spec_rollout.config.sections import ConfigError, LogConfig
from spec_rollout.extras import install_command
from spec_rollout.runs.outputs import write_text

TENSORBOARD = "tensorboard"
WANDB = "wandb"
_WANDB_ID = "wandb-id"

Row = Mapping[str, Any]


class Logger(Protocol):
    """What takes the rows of a run. Whatever its methods raise is caught by `RunLoggers`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a row; no row of that step or a later one was taken before."""
        ...

    def close(self, complete: bool) -> None:
        """Writes what is pending; `complete` says whether the run has done all its steps."""
        ...


def check_loggers(config: LogConfig) -> None:
    """Raises ConfigError, before anything is loaded, if a logger's library is not installed."""
    for name in config.to:
        if find_spec(name) is None:
            raise ConfigError(
                f"log.to: expected {name} to be installed for the logger {name} "
                f"({install_command(name)}), found no module {name}"
            )


class TensorBoardLogger:
    """Event files in `folder`; numbers keep all their digits (float64).

    Args:
        folder: Of the run's event files.
        rows: Rows of the run so far; of later steps, which a run that was killed had done, what the
            folder has is hidden. Where it has nothing, they are written to it.
    """

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        known = any(folder.glob("events.out.tfevents.*"))
        # Said of the first file, too: TensorBoard hides nothing at the first start it sees.
        next_step = rows[-1]["step"] + 1 if rows and known else 0
        self._writer = SummaryWriter(str(folder), purge_step=next_step)
        for row in () if known else rows:
            self.log(row["step"], numbers_of(row))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, new_style=True, double_precision=True)
        self._writer.flush()  # also brings up what the writing thread met

    def close(self, complete: bool) -> None:
        """See `Logger`."""
        self._writer.close()


class WandbLogger:
    """A W&B run, in `run_dir`/wandb.

    Its id is kept in `run_dir`, so that a resumed run goes on with the same curves. Steps that are
    done again keep the values they had: W&B takes no second row for a step.

    Args:
        run_dir: Folder of the run; its name is the run's unless WANDB_NAME says another.
        project: W&B project; None is WANDB_PROJECT or spec-rollout.
        settings: The config, for W&B's page of the run.
        rows: Rows of the run so far, which are written to a W&B run that is new.
    """

    def __init__(
        self, run_dir: Path, project: str | None, settings: Mapping[str, Any], rows: Sequence[Row]
    ) -> None:
        import wandb

        # Nobody may be there to answer the question for a key, or to wait for a slow upload.
        own: dict[str, Any] = {"console": "off", "login_timeout": 30.0, "finish_timeout": 300.0}
        own = {k: v for k, v in own.items() if f"WANDB_{k.upper()}" not in os.environ}
        id_file = run_dir / _WANDB_ID
        known = id_file.is_file()
        self._run = wandb.init(
            project=project or os.environ.get("WANDB_PROJECT") or "spec-rollout",
            name=os.environ.get("WANDB_NAME") or run_dir.resolve().name,
            id=id_file.read_text().strip() if known else None,
            resume="allow" if known else None,
            dir=str(run_dir),
            config=dict(settings),
            reinit="create_new",  # runs may be trained in turns
            settings=wandb.Settings(**own),
        )
        write_text(id_file, f"{self._run.id}\n")
        for row in () if known else rows:
            self.log(row["step"], numbers_of(row))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._run.log(dict(values), step=step, commit=True)

    def close(self, complete: bool) -> None:
        """See `Logger`."""
        self._run.finish(exit_code=0 if complete else 1)


class RunLoggers:
    """All loggers that a config names.

    Args:
        config: Names them.
        run_dir: Folder of the run, which exists.
        settings: The whole config as tables.
        rows: Rows of metrics.jsonl so far: those that a resumed run goes on from.
    """

    def __init__(
        self, config: LogConfig, run_dir: Path, settings: Mapping[str, Any], rows: Sequence[Row]
    ) -> None:
        makers: dict[str, Callable[[], Logger]] = {
            TENSORBOARD: lambda: TensorBoardLogger(run_dir / "tensorboard", rows),
            WANDB: lambda: WandbLogger(run_dir, config.wandb_project, settings, rows),
        }
        self._num_unlogged: dict[str, int] = dict.fromkeys(config.to, 0)
        self._told: set[str] = set()
        self._open: dict[str, Logger | None] = dict.fromkeys(config.to)
        for name in config.to:
            try:
                self._open[name] = makers[name]()
            except Exception as error:
                self._tell(name, "could not be started", error)

    @property
    def num_unlogged(self) -> dict[str, int]:
        """Rows that a logger has not taken, by its name; those that took all are left out."""
        return {name: count for name, count in self._num_unlogged.items() if count}

    def log(self, row: Row) -> None:
        """Hands a row to all loggers."""
        for name, logger in self._open.items():
            try:
                if logger is not None:
                    logger.log(row["step"], numbers_of(row))
                    continue
            except Exception as error:
                self._tell(name, f"did not take step {row['step']}", error)
            self._num_unlogged[name] += 1

    def close(self, *, complete: bool) -> None:
        """Closes all loggers and says what they lack; a second call does nothing."""
        for name, logger in self._open.items():
            try:
                if logger is not None:
                    logger.close(complete)
            except Exception as error:
                self._tell(name, "could not be closed", error)
        for name, count in self.num_unlogged.items() if self._open else ():
            _note(f"log.to: {name} lacks {count} rows of metrics.jsonl")
        self._open = {}

    def _tell(self, name: str, what: str, error: Exception) -> None:
        """Says what a logger raised, if it is the first time."""
        if name not in self._told:
            self._told.add(name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            _note(f"log.to: {name} {what}; training goes on without it ({reason})")


def numbers_of(row: Row) -> dict[str, float]:
    """What can be drawn of a row: its finite numbers, without the step itself."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and type(value) in (int, float) and value - value == 0
    }


def _note(text: str) -> None:
    # In one piece: a logger's thread may be writing its traceback there.
    sys.stderr.write(f"note: {text}\n")
    sys.stderr.flush()
