"""Rows of logits under a rule that decides beside vLLM's draws: `Lenient`, and `Coupled`'s bonus.

Row-aligned: each row has at most one draft token, that of the position it predicts, and is decided
without looking at the others. Which decisions count is settled by `kernels.outcome`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from spec_rollout import ops
from spec_rollout.acceptance import AcceptanceRule, RuleKind
from spec_rollout.engines.vllm.worker.v2.table import DraftTable, Field

# As `kernels` has them; that module needs triton.
_BY_DRAW, _PASSED, _REJECTED = 0, 1, 2

# Logits [num_rows, vocab] -> the token that each row draws. [num_rows], int64.
Draw = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """The logits rows of a step.

    Attributes:
        slots: Of each row. [num_rows], int64.
        positions: Of each row's input in the sequence. [num_rows], int64.
        offsets: Rows before it of the same request. [num_rows], int64.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor


def decide(
    table: DraftTable,
    rules: Mapping[AcceptanceRule, int],
    rows: Rows,
    logits: torch.Tensor,
    draw: Draw,
    *,
    prompt_lens: torch.Tensor,
    prefill_lens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws every row, and tests the draft token that it predicts where a rule says so.

    `Lenient` (SPEC-RL): the draft token is given where ln u <= scale * (log_lenience + ln p - ln q)
    with u of the request's key and the token's response position, and otherwise what the row draws,
    by noise that u has no part in. `Coupled(b)`: the draft token has b more in the draw.

    Args:
        table: The drafts.
        rules: Those of the step's requests (`DraftTable.rules`).
        rows: The step's.
        logits: Of the sampling distribution, up to a constant: after temperature and filters.
            [num_rows, vocab].
        draw: vLLM's.
        prompt_lens, prefill_lens: As in `kernels.outcome`.

    Returns:
        The token that each row gives [num_rows], int64, and decisions as `kernels.outcome` takes
        them [num_rows], int32.
    """
    device = logits.device
    numbers = table.numbers[rows.slots]
    indices = rows.positions + 1 - prompt_lens[rows.slots]
    follows = numbers[:, Field.ACCEPTED] >= indices - rows.offsets
    is_new = rows.positions + 1 >= prefill_lens[rows.slots]
    drafted = follows & is_new & (indices >= 0) & (indices < numbers[:, Field.LEN])
    columns = indices.clamp(0, table.max_model_len - 1)
    draft = table.tokens[rows.slots, columns].long()
    under = {rule: drafted & (numbers[:, Field.RULE] == n) for rule, n in rules.items()}

    drawn_from = logits
    for rule, member in under.items():
        if rule.kind is RuleKind.COUPLED:
            bonus = torch.where(member, rule.kernel_params[1], 0.0)
            drawn_from = drawn_from.to(torch.float32, copy=True)
            drawn_from.scatter_add_(1, draft[:, None], bonus[:, None])
    given = draw(drawn_from)

    decisions = torch.full(given.shape, _BY_DRAW, dtype=torch.int32, device=device)
    tested = {rule: m for rule, m in under.items() if rule.kind is not RuleKind.COUPLED}
    if tested:
        target = ops.token_logprobs(logits, torch.where(drafted, draft, 0))
        known = torch.zeros_like(target)
        if table.logprobs is not None:
            known = table.logprobs[rows.slots, columns]
        for rule, member in tested.items():
            passed = member & _passes(rule, known, target, numbers, indices)
            decisions = torch.where(member, torch.where(passed, _PASSED, _REJECTED), decisions)
            given = torch.where(passed, draft, given)
    return given, decisions.to(torch.int32)


def _passes(
    rule: AcceptanceRule,
    draft_logprobs: torch.Tensor,
    target_logprobs: torch.Tensor,
    numbers: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """Whether each row's token passes, as a draft of one token. [num_rows], bool."""
    num_rows = indices.numel()
    accepted = ops.accept_prefix(
        draft_logprobs,
        target_logprobs,
        rule=rule,
        keys=numbers[:, Field.KEY].contiguous(),
        cu_draft_lens=torch.arange(num_rows + 1, device=indices.device),
        positions=(indices + numbers[:, Field.FIRST_POSITION]).clamp(min=0),
    )
    return accepted > 0
