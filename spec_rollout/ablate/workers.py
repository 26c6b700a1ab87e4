"""Runs of a grid, one after the other or several at once, each in its folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from spec_rollout.ablate.overlap import ResponseFiles
from spec_rollout.config.sections import RunConfig
from spec_rollout.loading.policy import load_tokenizer
from spec_rollout.runs.files import CONFIG, SUMMARY, write_atomically
from spec_rollout.runs.load import load_run
from spec_rollout.train.interrupt import RunInterrupted
from spec_rollout.train.trainer import resume, run

OVERLAP = "overlap.json"  # the last file of a run: with it, the run is finished
_RESPONSES = "responses"


def is_finished(folder: Path) -> bool:
    """Whether nothing is left to do for a run."""
    return (folder / OVERLAP).is_file()


def train_one(config: RunConfig) -> None:
    """Trains a run, or the rest of it, and says how its epochs overlap.

    Raises:
        As `spec_rollout.train.trainer.run`; the run can be gone on with.
    """
    folder = Path(config.log.run_dir)
    if is_finished(folder):
        return
    responses = ResponseFiles(folder / _RESPONSES)
    if not (folder / SUMMARY).is_file():
        if (folder / CONFIG).is_file():
            resume(folder, on_rollouts=responses.add)
        else:
            run(config, on_rollouts=responses.add)
    rows = load_run(folder).metrics
    epochs = {row["step"]: row["epoch"] for row in rows if row["step"] > 0}
    tokenizer = load_tokenizer(Path(config.model.path))
    overlaps = responses.overlaps(
        epochs, lambda ids: tokenizer.batch_decode(ids, skip_special_tokens=True)
    )
    write_atomically(folder / OVERLAP, json.dumps({str(k): v for k, v in overlaps.items()}) + "\n")
    responses.remove()


def train_all(configs: Sequence[RunConfig], jobs: int, done: Callable[[RunConfig], None]) -> None:
    """Trains what is not finished.

    Args:
        configs: Of all runs, in the order in which they are begun.
        jobs: Runs at once, each in a process of its own; 1 is this process.
        done: Called with the config of each run that has ended.

    Raises:
        ValueError: naming a run that failed; no other one is begun then.
        RunInterrupted, KeyboardInterrupt: as the trainer does; every run can be gone on with.
    """
    left = [config for config in configs if not is_finished(Path(config.log.run_dir))]
    if jobs == 1:
        for config in left:
            train_one(config)
            done(config)
        return
    with _pool(min(jobs, max(1, len(left)))) as pool:
        futures = {pool.submit(_job, config): config for config in left}
        for future in as_completed(futures):
            config = futures[future]
            problem = future.result()
            if problem is not None:
                raise ValueError(f"{config.log.run_dir}: {problem}")
            done(config)


def _job(config: RunConfig) -> str | None:
    """`train_one` in a worker: what went wrong, or None. Not every exception can be handed over."""
    try:
        train_one(config)
    except RunInterrupted as error:
        return str(error)
    except Exception as error:
        if os.environ.get("SPEC_ROLLOUT_DEBUG") == "1":
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


@contextmanager
def _pool(size: int) -> Iterator[ProcessPoolExecutor]:
    """Workers that end with this process, however it ends, their runs kept."""
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    pool = ProcessPoolExecutor(
        size, mp_context=context, initializer=_begin, initargs=(os.getpid(),)
    )

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()  # a run that is asked so writes a checkpoint first
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if main:
            signal.signal(signal.SIGTERM, before)


def _begin(parent: int) -> None:
    """In a worker: between runs Ctrl-C is the parent's to answer; within one the run hears it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        print("the grid's process is gone: this run ends", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
