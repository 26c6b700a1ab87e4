"""What a reward function changes in the process is put back after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def process_kept() -> Iterator[None]:
    """Keeps the working directory, torch's defaults and the alarm clock as they are.

    A reward that changes the directory would move the run's files, one that changes torch's default
    type, device or gradient mode would change the update after it, and an alarm left on would go
    off in the trainer.
    """
    folder = os.getcwd()
    dtype, grad, device = (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_default_device(),
    )
    alarm = _alarm_is_on()
    try:
        yield
    finally:
        if not _is_working_directory(folder):
            os.chdir(folder)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
        if torch.get_default_device() != device:
            # None takes the setting away, which costs nothing afterwards.
            torch.set_default_device(None if device.type == "cpu" else device)
        if not alarm and _alarm_is_on():
            signal.setitimer(signal.ITIMER_REAL, 0)


def _alarm_is_on() -> bool:
    return hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _is_working_directory(folder: str) -> bool:
    try:
        return os.getcwd() == folder
    except FileNotFoundError:  # a folder that was removed since
        return False
