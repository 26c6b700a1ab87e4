"""sample_tokens against its plain definition (exactly), its reference and its law."""

from __future__ import annotations

import math

import pytest
import torch
from laws import assert_law
from opchecks import opcheck

from spec_rollout import ops
from spec_rollout._native import _C
from spec_rollout.ops.reference import logits as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 1: the only token; 7: less than a quad-aligned vector; 65: one more than a group of noise; 1000: a
# partial block at the end; 151936: a real vocabulary.
SHAPES = [(1, 1), (40, 7), (20, 65), (20, 1000), (2, 151936)]
FILTERS = [(0, 1.0), (5, 1.0), (0, 0.7), (20, 0.5), (3000, 0.999)]


def _case(batch, vocab, dtype, generator, spread=2.0):
    logits = (torch.randn(batch, vocab, generator=generator) * spread).to(dtype)
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    positions = torch.randint(0, 2**40, (batch,), generator=generator)
    return logits, keys, positions


def first_argmax(scores: torch.Tensor) -> torch.Tensor:
    """[rows, vocab] -> lowest id of the largest score, [rows] int32."""
    best = scores == scores.max(dim=1, keepdim=True).values
    return best.long().argmax(dim=1).int()


def plain_draw(logits, keys, positions, temperature, top_k, top_p) -> torch.Tensor:
    """The definition, term by term in float32, with the noise the kernels expose."""
    x = reference.scaled_logits(logits, temperature).float()
    noise = torch.empty(x.shape)
    _C.gumbel_noise(keys, positions, noise, 1)
    logp = reference.target_logprobs(logits, temperature, top_k, top_p)
    return first_argmax(torch.where(logp.isneginf(), -math.inf, x + noise))


@pytest.mark.parametrize(("batch", "vocab"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_equals_plain_definition(device, batch, vocab, dtype, top_k, top_p, generator) -> None:
    for spread, temperature in ((0.3, 1.0), (3.0, 0.7), (12.0, 1.3)):
        logits, keys, positions = _case(batch, vocab, dtype, generator, spread)
        got = ops.sample_tokens(
            logits.to(device),
            keys=keys.to(device),
            positions=positions.to(device),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        assert got.token_ids.dtype == torch.int32
        expected = plain_draw(logits, keys, positions, temperature, top_k, top_p)
        assert torch.equal(got.token_ids.cpu(), expected)
        tokens, logprobs = reference.sample_tokens(
            logits,
            keys=keys,
            positions=positions,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        assert torch.equal(tokens, expected)  # float64 noise of its own agrees
        torch.testing.assert_close(got.logprobs.double().cpu(), logprobs, atol=4e-6, rtol=1e-6)


def test_many_rows_equal_plain_definition(device, generator) -> None:
    """Enough draws that every branch of the skipping argmax is taken, at spreads from flat to
    peaked."""
    for spread in (0.0, 0.1, 1.0, 5.0, 30.0):
        logits, keys, positions = _case(2000, 257, torch.bfloat16, generator, spread)
        got = ops.sample_tokens(
            logits.to(device), keys=keys.to(device), positions=positions.to(device)
        )
        assert torch.equal(got.token_ids.cpu(), plain_draw(logits, keys, positions, 1.0, 0, 1.0))


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_unaligned_rows(device, dtype, offset, generator) -> None:
    logits, keys, positions = _case(9, 1003, dtype, generator)
    buffer = torch.full((9, 1030), math.nan, dtype=dtype)
    buffer[:, offset : offset + 1003] = logits
    args = {"keys": keys.to(device), "positions": positions.to(device), "top_k": 100}
    got = ops.sample_tokens(buffer.to(device)[:, offset : offset + 1003], **args)
    expected = ops.sample_tokens(logits.to(device), **args)
    assert torch.equal(got.token_ids, expected.token_ids)
    torch.testing.assert_close(got.logprobs, expected.logprobs, atol=2e-6, rtol=0)


def test_a_draw_depends_on_key_and_position_alone(device, generator) -> None:
    logits, keys, positions = _case(50, 300, torch.float32, generator)
    logits, keys, positions = logits.to(device), keys.to(device), positions.to(device)
    together = ops.sample_tokens(logits, keys=keys, positions=positions).token_ids
    order = torch.randperm(50, generator=generator).to(device)
    shuffled = ops.sample_tokens(
        logits[order], keys=keys[order], positions=positions[order].contiguous()
    )
    assert torch.equal(shuffled.token_ids, together[order])
    single = ops.sample_tokens(logits[7:8], keys=keys[7:8], positions=positions[7:8])
    assert torch.equal(single.token_ids, together[7:8])
    assert not torch.equal(
        ops.sample_tokens(logits, keys=keys, positions=positions + 1).token_ids, together
    )
    assert not torch.equal(
        ops.sample_tokens(logits, keys=keys + 1, positions=positions).token_ids, together
    )


def test_equal_scores_give_the_lowest_id(device) -> None:
    # At 2**40 the noise is below half a unit in the last place: all unmasked scores are equal.
    logits = torch.full((64, 1100), 2.0**40)
    first = torch.arange(64) * 17
    logits[torch.arange(1100)[None, :] < first[:, None]] = 0.0
    got = ops.sample_tokens(
        logits.to(device),
        keys=torch.arange(64, device=device),
        positions=torch.zeros(64, dtype=torch.int32, device=device),
    )
    assert torch.equal(got.token_ids.cpu(), first.int())


def test_greedy_is_the_first_argmax_without_filter(device, generator) -> None:
    logits = torch.randint(-3, 4, (30, 700), generator=generator).float()  # many ties
    keys, positions = (
        torch.arange(30, device=device),
        torch.zeros(30, dtype=torch.int64, device=device),
    )
    got = ops.sample_tokens(
        logits.to(device), keys=keys, positions=positions, temperature=0.0, top_k=1, top_p=0.1
    )
    expected = first_argmax(logits)
    assert torch.equal(got.token_ids.cpu(), expected)
    truth = logits.double().log_softmax(-1).gather(1, expected.long()[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs.double().cpu(), truth, atol=2e-6, rtol=0)


def test_per_row_parameters_equal_single_rows(device, generator) -> None:
    logits, keys, positions = _case(6, 500, torch.float32, generator)
    temperature = torch.tensor([0.0, 0.5, 1.0, 1.0, 2.0, 1.0])
    top_k = torch.tensor([5, 0, 7, 0, 499, 500])
    top_p = torch.tensor([0.5, 1.0, 1.0, 0.6, 0.9, 0.3])
    args = [a.to(device) for a in (logits, keys, positions, temperature, top_k, top_p)]
    logits, keys, positions = args[:3]
    got = ops.sample_tokens(
        logits, keys=keys, positions=positions, temperature=args[3], top_k=args[4], top_p=args[5]
    )
    for r in range(6):
        one = slice(r, r + 1)
        alone = ops.sample_tokens(
            logits[one],
            keys=keys[one],
            positions=positions[one],
            temperature=float(temperature[r]),
            top_k=int(top_k[r]),
            top_p=float(top_p[r]),
        )
        assert torch.equal(alone.token_ids, got.token_ids[one])
        assert torch.equal(alone.logprobs, got.logprobs[one])


def _drawn(logits: list[float], device, draws=4000, **filters) -> dict[int, float]:
    """Token -> log-prob over many keys."""
    wide = torch.tensor([logits], device=device).expand(draws, -1)
    got = ops.sample_tokens(
        wide,
        keys=torch.arange(draws, device=device),
        positions=torch.zeros(draws, dtype=torch.int64, device=device),
        **filters,
    )
    pairs = zip(got.token_ids.tolist(), got.logprobs.tolist(), strict=True)
    result: dict[int, float] = {}
    for token, logprob in pairs:
        assert result.setdefault(token, logprob) == logprob
    return result


def _logs(*weights: float) -> list[float]:
    return [math.log(w) if w > 0 else -math.inf for w in weights]


@pytest.mark.parametrize(
    ("weights", "filters", "kept"),
    [
        ((0.5, 0.3, 0.2), {}, {0: 0.5, 1: 0.3, 2: 0.2}),
        ((0.5, 0.3, 0.2), {"top_k": 2}, {0: 0.625, 1: 0.375}),
        ((0.5, 0.3, 0.2), {"top_k": 1}, {0: 1.0}),
        ((0.5, 0.3, 0.2), {"top_k": 3}, {0: 0.5, 1: 0.3, 2: 0.2}),
        ((0.5, 0.3, 0.2), {"top_k": 99}, {0: 0.5, 1: 0.3, 2: 0.2}),
        # ties with the k-th largest are kept
        ((0.4, 0.2, 0.2, 0.2), {"top_k": 2}, {0: 0.4, 1: 0.2, 2: 0.2, 3: 0.2}),
        ((0.5, 0.3, 0.2), {"top_p": 0.4}, {0: 1.0}),
        ((0.5, 0.3, 0.2), {"top_p": 0.51}, {0: 0.625, 1: 0.375}),
        ((0.5, 0.3, 0.2), {"top_p": 0.79}, {0: 0.625, 1: 0.375}),
        ((0.5, 0.3, 0.2), {"top_p": 0.81}, {0: 0.5, 1: 0.3, 2: 0.2}),
        ((0.2, 0.3, 0.5), {"top_p": 1e-6}, {2: 1.0}),
        ((0.25, 0.25, 0.25, 0.25), {"top_p": 0.3}, {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}),
        # top-p is of the distribution that top-k left: 0.625 reaches 0.6, 0.5 would not
        ((0.5, 0.3, 0.2), {"top_k": 2, "top_p": 0.6}, {0: 1.0}),
        # masked tokens count for nothing
        ((0.0, 0.6, 0.0, 0.4), {"top_k": 3}, {1: 0.6, 3: 0.4}),
        ((0.0, 0.6, 0.0, 0.4), {"top_p": 0.9999}, {1: 0.6, 3: 0.4}),
        ((0.0, 1.0, 0.0), {"top_k": 1, "top_p": 0.5}, {1: 1.0}),
    ],
)
def test_kept_sets_by_hand(device, weights, filters, kept) -> None:
    drawn = _drawn(_logs(*weights), device, **filters)
    assert drawn.keys() == kept.keys()
    for token, prob in kept.items():
        assert math.exp(drawn[token]) == pytest.approx(prob, rel=1e-6)


def test_top_p_counts_a_heavy_tail(device) -> None:
    """Half of the probability in tokens that are each a millionth: none of it is lost in the
    sum."""
    tail = 500_000
    logits = torch.full((1, tail + 1), math.log(0.5 / tail))
    logits[0, 0] = math.log(0.5)
    args = {
        "keys": torch.arange(1, device=device),
        "positions": torch.zeros(1, dtype=torch.int64, device=device),
    }
    head = ops.sample_tokens(logits.to(device), top_p=0.499, **args)
    assert head.token_ids.item() == 0
    assert -1e-7 < head.logprobs.item() <= 0.0
    both = ops.sample_tokens(logits.to(device), top_p=0.501, **args)
    expected = math.log(0.5 if both.token_ids.item() == 0 else 0.5 / tail)
    assert both.logprobs.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"temperature": 1.7}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.9}, [0, 1, 2, 3]),
    ],
)
def test_law(device, filters, kept) -> None:
    logits = torch.tensor(_logs(0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.009, 0.001))
    draws = 200_000
    got = ops.sample_tokens(
        logits.to(device)[None].expand(draws, -1),
        keys=torch.randint(
            -(2**62), 2**62, (draws,), generator=torch.Generator().manual_seed(3)
        ).to(device),
        positions=(torch.arange(draws, device=device) % 3),
        **filters,
    )
    counts = torch.bincount(got.token_ids.long().cpu(), minlength=8)
    assert int(counts.sum()) == int(counts[kept].sum()) == draws
    law = (logits[kept].double() / filters.get("temperature", 1.0)).softmax(0)
    assert_law(counts[kept], law)


def test_no_rows(device) -> None:
    empty = torch.empty(0, dtype=torch.int64, device=device)
    got = ops.sample_tokens(torch.empty(0, 9, device=device), keys=empty, positions=empty)
    assert got.token_ids.shape == got.logprobs.shape == (0,)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logits": torch.tensor([[0.0, math.nan], [0.0, 0.0]])}, r"logits: .*nan at \[0, 1\]"),
        ({"logits": torch.full((2, 2), -math.inf)}, "logits: .*finite"),
        # Too large divided by the temperature: +inf, and -inf.
        ({"logits": torch.tensor([[5.0, 6.0]] * 2), "temperature": 1e-38}, "logits: .*finite"),
        ({"logits": torch.tensor([[-5.0, -6.0]] * 2), "temperature": 1e-38}, "logits: .*finite"),
        ({"keys": torch.zeros(2, dtype=torch.int32)}, "keys"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, "keys"),
        ({"positions": torch.zeros(1, dtype=torch.int64)}, "positions"),
        ({"positions": torch.zeros(2)}, "positions"),
        ({"temperature": -0.5}, "temperature: .*got -0.5"),
        ({"temperature": torch.tensor([1.0, math.nan])}, "temperature: .*nan at index 1"),
        ({"top_k": -1}, "top_k: .*got -1"),
        ({"top_k": torch.tensor([0, -2])}, "top_k: .*got -2 at index 1"),
        ({"top_k": torch.tensor([0.0, 1.0])}, "top_k"),
        ({"top_p": 0.0}, "top_p: .*got 0"),
        ({"top_p": 1.5}, "top_p: .*got 1.5"),
        ({"top_p": torch.tensor([0.5, 0.0])}, "top_p: .*got 0 at index 1"),
        ({"top_p": torch.ones(3)}, "top_p"),
    ],
)
def test_errors_name_the_argument(device, raises_value_error, change, match) -> None:
    args = {
        "logits": torch.zeros(2, 2),
        "keys": torch.zeros(2, dtype=torch.int64),
        "positions": torch.zeros(2, dtype=torch.int64),
    }
    moved = {k: v.to(device) for k, v in args.items()}
    ops.sample_tokens(**moved)
    changed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with raises_value_error(match):
        ops.sample_tokens(**{**moved, **changed})


@pytest.mark.slow
def test_opcheck(device, generator) -> None:
    logits, keys, positions = (t.to(device) for t in _case(3, 20, torch.float32, generator))
    ones = torch.ones(3, device=device)
    opcheck(
        ("sample_tokens", (logits, keys, positions, None, 1.0, None, 0, None, 1.0)),
        ("sample_tokens", (logits, keys, positions, ones, 1.0, ones.int(), 0, ones, 1.0)),
    )
