"""The word in which kernels report bad values."""

from __future__ import annotations

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
