"""Errors in values that a CUDA kernel meets.

Reading a value back would force a synchronisation, so kernels stay in bounds whatever the values
are and set a bit in a status word, one per device. An engine reads it where it synchronises anyway
(`check_status`); `SPEC_ROLLOUT_CHECK=1` makes every op read it.
"""

from __future__ import annotations

import os

import torch

# Bits of `StatusBit` in csrc/include/spec_rollout/ops.h.
_MEANINGS = {
    1: "cu_draft_lens / cu_logits_lens / draft_lens: expected non-decreasing offsets "
    "within the tokens, got others",
    2: "token_ids / draft_ids: expected ids within the vocabulary, got others",
    4: "logits: expected numbers below +inf and at least one finite logit per row, got others",
    8: "draft_logprobs / target_logprobs: expected numbers, got NaN",
    16: "block_table / rows / starts: expected slots within the KV cache, got others",
    32: "temperature / top_k / top_p: expected values in their ranges, got others",
}
_CHECK_EVERY_CALL = os.environ.get("SPEC_ROLLOUT_CHECK", "0") not in ("", "0")
_words: dict[int, torch.Tensor] = {}  # by CUDA device index; -1 is the CPU


def status_word(tensor: torch.Tensor, *, on_cpu: bool = False) -> torch.Tensor | None:
    """The status word of the tensor's device ([1], int32); on CPU, where native errors are raised
    directly, None unless `on_cpu`."""
    if not tensor.is_cuda and not on_cpu:
        return None
    index = tensor.get_device()
    word = _words.get(index)
    if word is None:
        # The word outlasts an inference mode that the first op runs in, and outside of it a tensor
        # made there could not be cleared.
        with torch.inference_mode(False):
            # A copy rather than a kernel that fills it: compute-sanitizer's initcheck sees copies.
            word = torch.zeros(1, dtype=torch.int32).to(tensor.device)
        # Another thread may have been faster, and kernels report in its word by now.
        word = _words.setdefault(index, word)
    return word


def check_status(device: torch.device | str | None = None) -> None:
    """Raises what kernels have reported since the last check, and clears it.

    Args:
        device: A CUDA device; None checks all that have run an op. Waits for all streams of it.

    Raises:
        ValueError: naming the argument; or if there is no such device.
    """
    if device is None:
        indices = list(_words)
    else:
        try:
            given = torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"device: expected a CPU or CUDA device, got {device!r}") from None
        if given.type == "cpu":
            indices = [-1]
        else:
            indices = [torch.cuda.current_device() if given.index is None else given.index]
    for index in indices:
        if index in _words:
            _wait_for_device(index)
            _raise_reported(index)


def _wait_for_device(index: int) -> None:
    if index >= 0:
        torch.cuda.synchronize(index)


def _raise_reported(index: int) -> None:
    """What kernels of the current stream have reported, and those of others as far as they are."""
    word = _words.get(index)
    bits = 0 if word is None else int(word.item())
    if word is None or not bits:
        return
    # Only what was read, as kernels may report meanwhile; and before any kernel that comes later,
    # on whatever stream.
    word.bitwise_and_(~bits)
    _wait_for_device(index)
    raise ValueError("; ".join(text for bit, text in _MEANINGS.items() if bits & bit))


def after_launch(tensor: torch.Tensor) -> None:
    """Called by every op after its launch: checks at once if SPEC_ROLLOUT_CHECK is set."""
    if _CHECK_EVERY_CALL and tensor.is_cuda:
        _raise_reported(tensor.get_device())


def after_triton(tensor: torch.Tensor) -> None:
    """The same after a Triton kernel, whose interpreter reports through a status word on CPU, too:
    read at once there."""
    if not tensor.is_cuda:
        _raise_reported(tensor.get_device())
    else:
        after_launch(tensor)
