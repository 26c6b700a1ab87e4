"""accept_prefix against its reference, hand-computed cases and the closed-form law of the accepted
length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from laws import assert_law
from opchecks import opcheck

from spec_rollout import _C, ops
from spec_rollout.acceptance import Coupled, Lenient, NoReuse, OneHot, RandomCut, RandomReuse
from spec_rollout.ops.reference import accept_prefix as reference
from spec_rollout.ops.reference.noise import accept_uniforms
from spec_rollout.packed import cu_lens_from

INF = math.inf
RULES = [
    Lenient(0.0),
    Lenient(0.5),
    Lenient(-0.3),
    Lenient(0.2, scale=0.5),
    Lenient(0.2, min_target_prob=0.3),
    Lenient(INF),
    Lenient(-INF),
    OneHot(),
    RandomReuse(0.5),
    RandomCut(),
    NoReuse(),
]


def _case(batch: int, width: int, generator: torch.Generator, drift: float = 0.1):
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    lens = torch.randint(0, width + 1, (batch,), generator=generator)
    target = -torch.rand(batch, width, generator=generator) * 0.7
    draft = target + drift * torch.randn(batch, width, generator=generator)
    positions = torch.randint(0, 2**34, (batch,), generator=generator)
    return keys, lens, draft, target, positions


def _pack(padded: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    return padded[torch.arange(padded.shape[1])[None, :] < lens[:, None]]


# 1: one row; 15, 16, 17: around the vector width of the CPU kernel; 33: past a warp; 257: many
# vectors.
@pytest.mark.parametrize(
    ("batch", "width"), [(1, 1), (3, 15), (4, 16), (5, 17), (64, 33), (300, 257)]
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_reference(device, rule, batch, width, generator) -> None:
    keys, lens, draft, target, positions = _case(batch, width, generator)
    expected = reference.accept_prefix(
        draft, target, lens, rule=rule, keys=keys, positions=positions
    )
    args = {"rule": rule, "keys": keys.to(device), "positions": positions.to(device)}
    padded = ops.accept_prefix(
        draft.to(device), target.to(device), draft_lens=lens.to(device), **args
    )
    packed = ops.accept_prefix(
        _pack(draft, lens).to(device),
        _pack(target, lens).to(device),
        cu_draft_lens=cu_lens_from(lens).to(device),
        **args,
    )
    assert padded.dtype == packed.dtype == torch.int32
    assert torch.equal(padded.cpu(), expected)
    assert torch.equal(packed.cpu(), expected)


def test_int32_offsets_and_strided_rows(device, generator) -> None:
    keys, lens, draft, target, _ = _case(50, 40, generator)
    expected = ops.accept_prefix(draft, target, rule=Lenient(0.0), keys=keys, draft_lens=lens)
    wide = torch.full((50, 99), float("nan"))
    wide[:, 7:47] = draft
    strided = wide.to(device)[:, 7:47]
    got = ops.accept_prefix(
        strided,
        target.to(device),
        rule=Lenient(0.0),
        keys=keys.to(device),
        draft_lens=lens.int().to(device),
    )
    assert torch.equal(got.cpu(), expected)


def test_hand_computed() -> None:
    keys = torch.tensor([11, 12, 13])
    u = accept_uniforms(keys[:, None], torch.arange(4)[None, :])
    # Row 0 accepts two tokens: each log ratio is just above ln u, then just below. Row 1 is empty.
    # Row 2 accepts all.
    ratio = u.log() + 1e-4
    ratio[0, 2] -= 2e-4
    draft = torch.full((3, 4), -1.0)
    target = (draft.double() + ratio).float()
    accepted = ops.accept_prefix(
        draft, target, rule=Lenient(0.0), keys=keys, draft_lens=torch.tensor([4, 0, 4])
    )
    assert accepted.tolist() == [2, 0, 4]


@pytest.mark.parametrize(
    ("rule", "target", "draft", "expected"),
    [
        (Lenient(0.5), -INF, -1.0, 0),  # p = 0: never
        (Lenient(0.5), -INF, -INF, 0),  # p = q = 0: never
        (Lenient(0.0), -30.0, -INF, 1),  # q = 0 < p: ratio is infinite
        (Lenient(INF), -INF, -1.0, 1),  # full reuse asks nothing
        (Lenient(-INF), 0.0, -50.0, 0),
        (Lenient(0.0, min_target_prob=0.5), math.log(0.49), -9.0, 0),
        (Lenient(0.0, min_target_prob=0.5), math.log(0.51), -9.0, 1),
        (OneHot(), 0.0, -5.0, 1),  # p = 1
        (OneHot(), -INF, 0.0, 0),
    ],
)
def test_edges(device, rule, target, draft, expected, generator) -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=generator).to(device)
    one = torch.ones(1000, 1, device=device)
    accepted = ops.accept_prefix(
        one * draft, one * target, rule=rule, keys=keys, draft_lens=torch.ones_like(keys)
    )
    assert (accepted == expected).all()


@pytest.mark.parametrize(("log_lenience", "scale"), [(0.0, 1.0), (0.5, 1.0), (0.2, 0.5)])
def test_law_of_accepted_lens(log_lenience, scale, generator) -> None:
    """P(accepted = n) = (1 - a_n) prod_{i < n} a_i with a_i = min(1, (l p_i / q_i)^scale)."""
    batch = 300_000
    target = torch.tensor([0.5, 0.2, 0.9, 0.05])
    draft = torch.tensor([0.6, 0.5, 0.7, 0.2])
    accept = ((target / draft).log().add(log_lenience) * scale).exp().clamp(max=1).double()
    alive = torch.cat([torch.ones(1).double(), accept.cumprod(0)])
    law = alive * torch.cat([1 - accept, torch.ones(1).double()])
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    accepted = ops.accept_prefix(
        draft.log().repeat(batch, 1),
        target.log().repeat(batch, 1),
        rule=Lenient(log_lenience, scale=scale),
        keys=keys,
        draft_lens=torch.full((batch,), 4),
    )
    assert_law(np.bincount(accepted.numpy(), minlength=5), law)


def test_ties_are_decided_exactly(generator) -> None:
    """A threshold equal to ln u accepts and the next float below it rejects, whichever way the
    kernel decides."""
    batch, width = 300, 64
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    log_u = torch.tensor(
        [
            [_C.exact_log(_C.uniform_from_bits(_C.accept_bits(key, i))) for i in range(width)]
            for key in keys.tolist()
        ]
    )
    lens = torch.full((batch,), width)
    accepted = ops.accept_prefix(None, log_u, rule=OneHot(), keys=keys, draft_lens=lens)
    assert (accepted == width).all()
    rejected_at = torch.randint(0, width, (batch,), generator=generator)
    below = log_u.clone()
    rows = torch.arange(batch)
    below[rows, rejected_at] = log_u[rows, rejected_at].nextafter(torch.tensor(-INF))
    accepted = ops.accept_prefix(None, below, rule=OneHot(), keys=keys, draft_lens=lens)
    assert torch.equal(accepted, rejected_at.int())


def test_decision_depends_on_key_and_position_alone(generator) -> None:
    keys, lens, draft, target, _ = _case(40, 100, generator)
    whole = ops.accept_prefix(draft, target, rule=Lenient(0.0), keys=keys, draft_lens=lens)
    order = torch.randperm(40, generator=generator)
    shuffled = ops.accept_prefix(
        draft[order], target[order], rule=Lenient(0.0), keys=keys[order], draft_lens=lens[order]
    )
    assert torch.equal(shuffled, whole[order])
    # In two chunks: the second continues at its position.
    first = ops.accept_prefix(
        draft[:, :37], target[:, :37], rule=Lenient(0.0), keys=keys, draft_lens=lens.clamp(max=37)
    )
    second = ops.accept_prefix(
        draft[:, 37:],
        target[:, 37:],
        rule=Lenient(0.0),
        keys=keys,
        draft_lens=(lens - 37).clamp(min=0),
        positions=torch.full((40,), 37),
    )
    assert torch.equal(torch.where(first == 37, first + second, first), whole)


def test_empty_batch(device) -> None:
    empty = torch.empty(0, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    accepted = ops.accept_prefix(
        empty,
        empty,
        rule=Lenient(0.5),
        keys=none,
        cu_draft_lens=torch.zeros(1, dtype=torch.int64, device=device),
    )
    assert accepted.shape == (0,)


def test_errors_name_the_argument(generator) -> None:
    keys, lens, draft, target, positions = _case(4, 10, generator)
    lens = torch.tensor([3, 0, 10, 2])
    good = {"rule": Lenient(0.5), "keys": keys, "draft_lens": lens}

    def fails(match: str, **changes) -> None:
        args = {"draft_logprobs": draft, "target_logprobs": target, **good, **changes}
        with pytest.raises(ValueError, match=match):
            ops.accept_prefix(args.pop("draft_logprobs"), args.pop("target_logprobs"), **args)

    fails("rule: expected a rule that tests log-prob.*Coupled", rule=Coupled())
    fails("cu_draft_lens, draft_lens: expected exactly one.*both", cu_draft_lens=lens)
    fails("cu_draft_lens, draft_lens: expected exactly one.*neither", draft_lens=None)
    fails("draft_logprobs: expected a tensor for Lenient, got None", draft_logprobs=None)
    fails("draft_logprobs: expected float32, got float64", draft_logprobs=draft.double())
    fails(
        r"draft_logprobs: expected shape \[batch = 4, max_draft_len = 10\], got \[4, 9\]",
        draft_logprobs=draft[:, :9],
    )
    fails(
        "target_logprobs: expected a contiguous last dimension",
        target_logprobs=torch.zeros(10, 4).T,
    )
    fails(
        r"draft_lens: expected 0 <= value < 11, got 11 at index 1",
        draft_lens=torch.tensor([3, 11, 0, 0]),
    )
    fails(
        r"draft_lens: expected 0 <= value < 11, got -1 at index 3",
        draft_lens=torch.tensor([3, 1, 0, -1]),
    )
    fails("keys: expected int64, got int32", keys=keys.int())
    fails(
        r"positions: expected shape \[batch = 4\], got \[5\]",
        positions=torch.zeros(5, dtype=torch.int64),
    )
    fails("positions: expected int32 or int64, got float32", positions=positions.float())
    bad = target.clone()
    bad[2, 0] = float("nan")
    fails("expected numbers, got NaN in row 2", target_logprobs=bad)
    packed = {
        "draft_lens": None,
        "draft_logprobs": torch.zeros(6),
        "target_logprobs": torch.zeros(6),
    }
    fails(
        "cu_draft_lens: expected to start at 0, got 1",
        cu_draft_lens=torch.tensor([1, 2, 3, 4, 6]),
        **packed,
    )
    fails(
        "cu_draft_lens: expected non-decreasing.*3 then 2 at index 3",
        cu_draft_lens=torch.tensor([0, 2, 3, 2, 6]),
        **packed,
    )
    fails(
        "cu_draft_lens: expected to end at 6, got 5",
        cu_draft_lens=torch.tensor([0, 2, 3, 4, 5]),
        **packed,
    )


@pytest.mark.slow
def test_opcheck(device, generator) -> None:
    keys, lens, draft, target, positions = (t.to(device) for t in _case(6, 20, generator))
    opcheck(("accept_prefix", (draft, target, lens, None, keys, positions, 0, 0.5, 1.0, 0.0)))


@pytest.mark.slow
def test_compiles_without_graph_break(generator) -> None:
    keys, lens, draft, target, _ = _case(6, 20, generator)

    def lens_of(draft, target, keys, lens):
        return ops.accept_prefix(draft, target, rule=Lenient(0.0), keys=keys, draft_lens=lens) + 1

    compiled = torch.compile(lens_of, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(draft, target, keys, lens), lens_of(draft, target, keys, lens))
