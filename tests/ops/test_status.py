"""The word in which kernels report bad values."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from spec_rollout import ops
from spec_rollout.ops import _status


def test_what_was_reported_within_inference_mode_is_raised_once_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine's first op makes the word there, and its caller reads it."""
    monkeypatch.setattr(_status, "_words", {})
    with torch.inference_mode():
        word = _status.status_word(torch.zeros(1), on_cpu=True)
        assert word is not None
        word.fill_(4)
    with pytest.raises(ValueError, match="logits: expected numbers below"):
        ops.check_status("cpu")
    ops.check_status("cpu")


class _BusyWord(torch.Tensor):
    """A status word in which another kernel reports just after it was read."""

    def item(self) -> Any:
        bits = super().item()
        if bits & 4:
            self.bitwise_or_(2)
        return bits


def test_what_is_reported_while_the_word_is_read_is_raised_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    word = torch.tensor([4], dtype=torch.int32).as_subclass(_BusyWord)
    monkeypatch.setattr(_status, "_words", {-1: word})
    with pytest.raises(ValueError, match=r"^logits: expected numbers below [^;]*$"):
        ops.check_status("cpu")
    with pytest.raises(ValueError, match=r"^token_ids / draft_ids: [^;]*$"):
        ops.check_status("cpu")
    ops.check_status("cpu")


def test_a_check_waits_for_all_streams_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may report until then."""
    word = torch.zeros(1, dtype=torch.int32)
    waited_for: list[int] = []

    def synchronize(index: int) -> None:
        waited_for.append(index)
        if len(waited_for) == 1:
            word.fill_(4)

    monkeypatch.setattr(_status, "_words", {1: word})
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    ops.check_status("cuda:0")  # no op has run there
    assert waited_for == []
    with pytest.raises(ValueError, match="logits"):
        ops.check_status("cuda:1")
    ops.check_status()
    assert set(waited_for) == {1}
    assert word.item() == 0


def test_threads_that_use_a_device_first_at_once_share_its_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_status, "_words", {})
    both_found_none = threading.Barrier(2, timeout=30)
    zeros = torch.zeros

    def zeros_of_both(*args: Any, **kwargs: Any) -> torch.Tensor:
        both_found_none.wait()
        return zeros(*args, **kwargs)

    tensor = zeros(1)
    monkeypatch.setattr(torch, "zeros", zeros_of_both)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(
            lambda _: _status.status_word(tensor, on_cpu=True), range(2), timeout=60
        )
    assert one is other is _status._words[-1]
