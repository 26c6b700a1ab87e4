"""Holds a model to what the engine assumes: a row's logits do not depend on its company.

Some models choose by the longest row of a batch, cut their own causal mask from the width of the
cache, or read a mask in a way of their own. Their log-probs would be wrong by nats, silently.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.lengths import windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGGER = logging.getLogger(__name__)
# What was measured, by architecture: weights do not matter, and engines are made again and again.
# An error is not kept, as it may be gone the next time.
_PROBLEMS: dict[Hashable, str | None] = {}

# Rows longer than this are not tried: the check is to cost less than a second.
_LONGEST = 640
_PAST_WINDOW = 9
_LENS = (1, 4, 17, 40)
# Of mean absolute differences of log-probs, in nats. Rounding of float32 stays below 1e-4, that of
# 16-bit types below 0.03; TF32, with ten bits where bfloat16 has seven, is between them. What is
# wrong is wrong by 0.1 and more.
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3}
_TOLERANCE_TF32 = 0.02
_TOLERANCE_16_BIT = 0.08


@dataclass(frozen=True, slots=True)
class RowGap:
    """How far the engine's log-probs are from those of a plain forward of each row alone.

    Attributes:
        mean, largest: Over all tokens of the rows tried, nats.
        row_len: Length of the row with the largest difference.
        tolerance: Of the mean.
    """

    mean: float
    largest: float
    row_len: int
    tolerance: float

    @property
    def is_rounding(self) -> bool:
        return self.mean <= self.tolerance

    def __str__(self) -> str:
        return (
            f"log-probs that differ by {self.mean:.2g} nats on average, {self.largest:.2g} at "
            f"most, from those of each row alone (worst in a row of {self.row_len} tokens)"
        )


def checked_forward(
    model: PreTrainedModel, batch_invariant: bool | None, max_model_len: int | None
) -> ModelForward:
    """A `ModelForward` that was tried.

    Where `batch_invariant` is left to us and the model's attention is not made for it (a soft cap,
    sinks), forwards with masks are taken instead, and that is logged.

    Raises:
        ValueError: as `ModelForward`; or if rows depend on their company, saying by how much.
    """
    forward = ModelForward(model, batch_invariant, max_model_len)
    problem = _problem(forward)
    if problem and batch_invariant is None and forward.batch_invariant:
        masked = ModelForward(model, False, max_model_len)
        if _problem(masked) is None:
            _LOGGER.warning(
                "%s: batch-invariant forwards cannot be had (%s); forwards with masks are used",
                type(model).__name__,
                problem,
            )
            return masked
    if problem:
        raise ValueError(
            f"model: expected a forward in which no row depends on the others, "
            f"{type(model).__name__} {problem} ({_way_out(forward)}check_model=False takes it as "
            "it is)"
        )
    return forward


def _way_out(forward: ModelForward) -> str:
    """Whether shorter rows would do, for the message."""
    for window in sorted(windows(forward.config), reverse=True):
        if window < (forward.max_model_len or math.inf):
            shorter = ModelForward(forward.model, forward.batch_invariant, window)
            if _problem(shorter) is None:
                return f"rows of at most {window} tokens are right: max_model_len={window}; "
    return ""


def _problem(forward: ModelForward) -> str | None:
    """What is wrong with a model's forwards, in words that follow its name; None if nothing is."""
    model = forward.model
    identity = (
        type(model),
        model.config.to_json_string(),  # without the attention
        model.config._attn_implementation,
        forward.config._attn_implementation,
        forward.dtype,
        forward.computes_16_bit,
        forward.device.type,
        allows_tf32(forward.device),
        forward.batch_invariant,
        forward.max_model_len,
    )
    if identity not in _PROBLEMS:
        try:
            gap = row_gap(forward)
        except (MemoryError, torch.OutOfMemoryError):  # says nothing about the model
            raise
        except Exception as error:  # whatever a model's own code raises
            text = " ".join(str(error).split())
            return f"raised {type(error).__name__}: {text}"
        _PROBLEMS[identity] = None if gap.is_rounding else f"gives {gap}"
    return _PROBLEMS[identity]


def row_gap(forward: ModelForward, *, seed: int = 0) -> RowGap:
    """Tries one ragged batch, long and short rows, fed in chunks and token by token.

    Args:
        forward: Of the model; outside its session.
    """
    lens = row_lens(windows(forward.config), forward.max_model_len)
    rows = random_rows(forward.vocab_size, lens, forward.device, seed)
    expected = [plain_logits(forward.model, row) for row in rows]
    with forward.session():
        actual = _together(forward, rows)
    return compare(actual, expected, rows, is_16_bit=forward.computes_16_bit)


def random_rows(
    vocab_size: int, lens: Sequence[int], device: torch.device, seed: int = 0
) -> list[torch.Tensor]:
    """Rows of random token ids. Each [len], int64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).to(device) for n in lens]


def row_lens(windows: Sequence[int], longest: int | None) -> list[int]:
    """Lengths worth trying: a few short ones, and one past every window that is not too long.

    Args:
        windows: How far tokens see in some layers.
        longest: Most tokens of a row; None is no limit.
    """
    limit = min(_LONGEST, longest or _LONGEST)
    past = [w + _PAST_WINDOW for w in windows if w + _PAST_WINDOW <= limit]
    return sorted({min(n, limit) for n in (*_LENS, *past)})


def plain_logits(model: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
    """Logits of a plain forward of one row, as anybody would call the model. [tokens, vocab]."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            return model(input_ids=row[None], use_cache=False, return_dict=True).logits[0]
    finally:
        for module in training:
            module.training = True


def compare(
    actual: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    *,
    is_16_bit: bool = False,
) -> RowGap:
    """Differences of log-probs, of the likeliest tokens and of those that follow.

    Args:
        actual, expected: Logits of each row. Each [tokens, vocab].
        rows: Token ids of each row. Each [tokens].
        is_16_bit: They were computed in such a type, whatever they are now.
    """
    gaps = [_gaps(a, b, row) for a, b, row in zip(actual, expected, rows, strict=True)]
    every = torch.cat(gaps)
    every = every[every.isfinite()]  # a model may forbid tokens
    if not every.numel():
        return RowGap(0.0, 0.0, 0, math.inf)
    worst = max(range(len(gaps)), key=lambda r: float(gaps[r].nan_to_num().max()))
    dtype = torch.bfloat16 if is_16_bit else expected[0].dtype
    tolerance = tolerance_of(dtype, expected[0].device)
    return RowGap(float(every.mean()), float(every.max()), len(rows[worst]), tolerance)


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """What rounding may make of the mean difference of log-probs computed so, in nats."""
    if dtype == torch.float32 and allows_tf32(device):
        return _TOLERANCE_TF32
    return _TOLERANCE.get(dtype, _TOLERANCE_16_BIT)


def allows_tf32(device: torch.device) -> bool:
    """Whether a device's products in float32 may be of numbers that are rounded to TF32."""
    if device.type != "cuda":
        return False
    matmul: Any = torch.backends.cuda.matmul
    # Where torch has this (2.9), it says what any of its settings came to, and the older one may
    # not be asked for any more.
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def _together(forward: ModelForward, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same through the engine's forwards: a part of each row, single tokens, the rest.

    The longest row goes ahead: short ones are fed while it is past every window.
    """
    device = forward.device
    num_rows = len(rows)
    # A row's padding is written behind it.
    cache = forward.new_cache(num_rows, 2 * max(map(len, rows)))
    fed = [0] * num_rows
    pieces: list[list[torch.Tensor]] = [[] for _ in rows]
    ahead = max(range(num_rows), key=lambda r: len(rows[r]))
    # Rows that are finished go on with their last token written again, as the first rows of the
    # cache are what a forward takes; it changes nothing that is read.
    for share in (0.4, 0.0, 0.0, 0.7, 0.0, 1.0):
        counts = []
        for r, (row, done) in enumerate(zip(rows, fed, strict=True)):
            left = len(row) - done
            wanted = left - 4 if r == ahead and not done else int(left * share)
            counts.append(min(left, max(1, wanted)) if left else 1)
        starts = [min(done, len(row) - 1) for row, done in zip(rows, fed, strict=True)]
        tokens = torch.cat([row[s : s + n] for row, s, n in zip(rows, starts, counts, strict=True)])
        width = max(s + n for s, n in zip(starts, counts, strict=True))
        logits = forward(
            cache,
            tokens,
            torch.tensor(starts, device=device),
            torch.tensor(counts, device=device),
            width,
        )
        for r, part in enumerate(logits.split(counts)):
            if fed[r] < len(rows[r]):
                pieces[r].append(part)
                fed[r] += counts[r]
    return [torch.cat(parts) for parts in pieces]


def _gaps(actual: torch.Tensor, expected: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Of each token's next one: of the likeliest, and of the one that follows. [2 * tokens]."""
    a, b = actual.double().log_softmax(-1), expected.double().log_softmax(-1)
    likeliest = b.argmax(-1, keepdim=True)
    following = torch.cat([row[1:], row[:1]])[:, None].clamp(max=b.shape[-1] - 1)
    index = torch.cat([likeliest, following], dim=-1)
    return (a.gather(-1, index) - b.gather(-1, index)).abs().flatten()
