"""How far several runs are, how long the rest will take, and what they have shown so far."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from spec_rollout.runs.load import number
from spec_rollout.runs.progress import Ticker, clock_time

Row = Mapping[str, Any]


def _before(row: Row) -> str:
    """The evaluation before training, in words."""
    names = {"train": "training prompts", "heldout": "held-out prompts"}
    values = {name: number(row.get(f"accuracy_{part}")) for part, name in names.items()}
    found = [f"{value:.1%} on {name}" for name, value in values.items() if value is not None]
    return f"accuracy before training: {', '.join(found) or 'no response was judged'}"


class Progress(Ticker):
    """Says what is going on: figures after every epoch, and a sign of life in between.

    On a terminal a bar, moving with every step of a run; elsewhere a line when nothing was said for
    `every` seconds. `on_step` is the callback of `train_grid`.

    Args:
        turns: Names of the runs that train together, one list after the other (`Grid.turns`).
        num_steps: Training steps of each run.
        num_epochs: Epochs of each run.
        num_evals_after: Evaluations at the end of all runs together, for the estimate.
        stream: Where lines go; the bar goes to stderr.
        every: Seconds of silence before a line.
        bar: Whether to show a bar; None: if stderr is a terminal.
        clock: Seconds since any moment.
    """

    def __init__(
        self,
        turns: Sequence[Sequence[str]],
        *,
        num_steps: int,
        num_epochs: int,
        num_evals_after: int = 0,
        stream: TextIO | None = None,
        every: float = 30.0,
        bar: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._turns = [list(names) for names in turns]
        self._names = [name for names in self._turns for name in names]
        self._num_steps = num_steps
        self._num_epochs = num_epochs
        self._num_evals_after = num_evals_after
        self._stream = sys.stdout if stream is None else stream
        self._every = every
        self._clock = clock
        self._rows: dict[str, list[Row]] = {name: [] for name in self._names}
        self._eval_seconds = 0.0
        self._begin = self._said = clock()
        self._bar: Any = None
        if sys.stderr.isatty() if bar is None else bar:
            from tqdm import tqdm

            # The time left is our own estimate: steps of different runs differ in length.
            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
            total = len(self._names) * num_steps
            self._bar = tqdm(total=total, bar_format=shape, dynamic_ncols=True, file=sys.stderr)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._bar is not None:
            self._bar.close()

    def on_step(self, name: str, row: Row) -> None:
        """A run has written a row: its evaluation before training, or a step."""
        with self._lock:
            self._eval_seconds = row.get("eval_seconds", self._eval_seconds)
            if row["step"] == 0:
                self._say(_before(row))
            else:
                self._rows[name].append(row)
                if self._bar is not None:
                    self._bar.update(1)
                self._say_figures(name, row["epoch"])
            self._show()

    def left(self) -> float | None:
        """Seconds that the rest will take, if every step takes as long as the run's last one.

        None before a step was measured.
        """
        last = {name: rows[-1]["step_seconds"] for name, rows in self._rows.items() if rows}
        if not last:
            return None
        mean = sum(last.values()) / len(last)
        steps = sum(
            (self._num_steps - len(rows)) * last.get(name, mean)
            for name, rows in self._rows.items()
        )
        return steps + self._num_evals_after * self._eval_seconds

    def status(self) -> str:
        """What is going on now, in one line."""
        unfinished = [name for name in self._names if len(self._rows[name]) < self._num_steps]
        gone = clock_time(self._clock() - self._begin)
        if not unfinished:
            return f"{gone} gone: evaluating"
        together = next(names for names in self._turns if unfinished[0] in names)
        name = min(together, key=lambda n: len(self._rows[n]))
        step = len(self._rows[name]) + 1
        left = self.left()
        rest = "the first step tells how long" if left is None else f"about {clock_time(left)} left"
        rows = self._rows[name]
        rate = ""
        if rows:
            speed = rows[-1]["num_response_tokens"] / max(rows[-1]["step_seconds"], 1e-9)
            rate = f", {speed:.0f} tokens/s"
        return f"{gone} gone, {rest}: {name}, step {step} of {self._num_steps}{rate}"

    def _say_figures(self, name: str, epoch: int) -> None:
        """Once all runs that train together have done a step: after the first, and every epoch."""
        together = next(names for names in self._turns if name in names)
        done = len(self._rows[name])
        if any(len(self._rows[n]) != done for n in together):
            return
        if done * self._num_epochs % self._num_steps == 0:
            self._say(self._figures(together, epoch, f"epoch {epoch + 1} of {self._num_epochs}"))
        elif done == 1:
            self._say(self._figures(together, epoch, f"step 1 of {self._num_steps}"))

    def _figures(self, together: Sequence[str], epoch: int, what: str) -> str:
        rows = {n: [row for row in self._rows[n] if row["epoch"] == epoch] for n in together}
        seconds = {n: sum(row["rollout_seconds"] for row in rows[n]) for n in together}
        figures = []
        for n in together:
            ratio = seconds[together[0]] / max(seconds[n], 1e-9)
            tokens = max(1, sum(row["num_response_tokens"] for row in rows[n]))
            reused = sum(row["num_reused_tokens"] for row in rows[n]) / tokens
            more = f" ({ratio:.2f}x, {reused:.0%} reused)" if epoch and n != together[0] else ""
            figures.append(f"{n} {seconds[n]:.1f}{more}")
        note = "" if epoch else " (nothing to reuse yet)"
        left = self.left() or 0.0
        return (
            f"{what}: rollout seconds {', '.join(figures)}{note}; "
            f"{clock_time(self._clock() - self._begin)} gone, about {clock_time(left)} left"
        )

    def _say(self, line: str) -> None:
        self._said = self._clock()
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self.status())

    def tick_once(self) -> None:
        """Keeps the bar's clock going; elsewhere breaks a silence that lasts too long."""
        with self._lock:
            if self._stop.is_set():
                return
            if self._bar is not None:
                self._show()
            elif self._clock() - self._said >= self._every:
                self._say(self.status())
