"""token_logprobs against float64, at the edges of its vector blocks, and its errors."""

from __future__ import annotations

import math

import pytest
import torch
from opchecks import opcheck

from spec_rollout import ops
from spec_rollout.ops.reference import logits as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 1: the only token; 7: less than a vector; 1000: a partial block at the end; 513: a block of one
# token; 151936: a real vocabulary.
SHAPES = [(1, 1), (3, 7), (5, 1000), (2, 513), (2, 151936)]


def assert_logprobs_close(
    got: torch.Tensor, truth: torch.Tensor, torch_float32: torch.Tensor
) -> None:
    """Error against float64 no worse than that of torch in float32, plus two roundings of the
    result."""
    got, torch_float32 = got.double().cpu(), torch_float32.double().cpu()
    assert torch.equal(got.isneginf(), truth.isneginf())
    finite = truth.isfinite()
    slack = 2e-7 * truth.abs() + 4e-7
    allowed = (torch_float32 - truth).abs() + slack
    error = (got - truth).abs()
    assert bool((error <= allowed)[finite].all()), (error - allowed)[finite].max()


def _case(rows, vocab, dtype, generator, spread=3.0):
    logits = (torch.randn(rows, vocab, generator=generator) * spread).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=generator)


def _plain(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(1, ids.long()[:, None])[:, 0]


@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.5, 10.0])
def test_equals_float64(device, token_logprobs, rows, vocab, dtype, spread, generator) -> None:
    logits, ids = _case(rows, vocab, dtype, generator, spread)
    got = token_logprobs(logits.to(device), ids.to(device))
    assert got.shape == (rows,)
    assert got.dtype == torch.float32
    assert_logprobs_close(got, reference.token_logprobs(logits, ids), _plain(logits, ids))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_of_a_row(device, interpreted, token_logprobs, dtype, generator) -> None:
    """No token of a block, vector or tail is left out of the sum or read from the wrong place."""
    logits = (torch.randn(1, 1100, generator=generator) * 4).to(dtype)
    ids = torch.arange(0, 1100, 23 if interpreted else 1)
    wide = logits.expand(len(ids), -1)
    got = token_logprobs(wide.to(device), ids.int().to(device))
    assert_logprobs_close(got, reference.token_logprobs(wide, ids), _plain(wide, ids))
    if not interpreted:
        assert float(got.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_strided_and_unaligned_rows(device, token_logprobs, dtype, offset, generator) -> None:
    rows, vocab = 4, 1003
    buffer = torch.full((rows, vocab + 20), math.nan, dtype=dtype)
    logits, ids = _case(rows, vocab, dtype, generator)
    buffer[:, offset : offset + vocab] = logits
    view = buffer.to(device)[:, offset : offset + vocab]
    got = token_logprobs(view, ids.to(device))
    assert_logprobs_close(got, reference.token_logprobs(logits, ids), _plain(logits, ids))


def test_temperature_number_and_per_row(device, token_logprobs, generator) -> None:
    logits, ids = _case(4, 1000, torch.float32, generator)
    temperature = torch.tensor([0.5, 1.0, 3.0, 0.0])
    got = token_logprobs(logits.to(device), ids.to(device), temperature.to(device)).cpu()
    torch.testing.assert_close(
        got.double(), reference.token_logprobs(logits, ids, temperature), atol=4e-6, rtol=0
    )
    for row, value in enumerate(temperature.tolist()):
        alone = token_logprobs(
            logits[row : row + 1].to(device), ids[row : row + 1].to(device), value
        )
        assert torch.equal(alone.cpu(), got[row : row + 1])


def test_hand_computed(device, token_logprobs) -> None:
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]], device=device).expand(3, -1)
    got = token_logprobs(logits, torch.arange(3, device=device)).exp().cpu()
    torch.testing.assert_close(got, torch.tensor([0.125, 0.25, 0.625]))


def test_masked_and_extreme_logits(device, token_logprobs) -> None:
    inf = math.inf
    rows = [
        [-inf, 0.0, -inf, 0.0],  # masked tokens have no weight
        [-inf, -inf, 7.0, -inf],  # one token left
        [-3e38, 0.0, -3e38, 0.0],  # a finite mask value
        [3e38, -3e38, 3e38, 0.0],  # differences overflow
        [-3e38, -3e38, -3e38, -3e38],  # all the same, far down
        [1e4, 1e4 - 1.0, -1e4, 0.0],
    ]
    wide = torch.full((len(rows), 1030), -inf)
    wide[:, [0, 5, 600, 1029]] = torch.tensor(rows)  # in different vectors and blocks
    columns = torch.tensor([0, 5, 600, 1029])
    for index, column in enumerate(columns.tolist()):
        ids = torch.full((len(rows),), column)
        got = token_logprobs(wide.to(device), ids.to(device)).cpu()
        truth = torch.tensor(rows).double().log_softmax(-1)[:, index]
        # float32 of a difference that overflows is -inf; so is torch's.
        truth = truth.float().double()
        torch.testing.assert_close(got.double(), truth, atol=1e-6, rtol=1e-6)


def test_float16_specials(device, token_logprobs) -> None:
    """Subnormals and the largest numbers of float16 survive the conversion."""
    values = torch.tensor([[6e-8, 6.1e-5, 1e-3, 65504.0, -65504.0, -math.inf, 0.0, -6e-8]]).half()
    for shift in (0.0, 65504.0):
        logits = torch.cat([values, torch.full((1, 1), shift).half()], dim=1)
        ids = torch.arange(logits.shape[1])
        wide = logits.expand(len(ids), -1)
        got = token_logprobs(wide.to(device), ids.to(device)).cpu()
        truth = wide.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(got.double(), truth, atol=1e-6, rtol=2e-7)


def test_no_rows(device, token_logprobs) -> None:
    got = token_logprobs(
        torch.empty(0, 11, device=device), torch.empty(0, dtype=torch.int64, device=device)
    )
    assert got.shape == (0,)


def test_result_does_not_depend_on_threads(generator) -> None:
    logits, ids = _case(40, 5000, torch.bfloat16, generator)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.token_logprobs(logits, ids)
        torch.set_num_threads(4)
        assert torch.equal(ops.token_logprobs(logits, ids), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("column", [0, 6, 511, 512, 1029])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("background", [0.0, -math.inf])
def test_nan_is_found_wherever_it_is(
    device, token_logprobs, raises_value_error, dtype, column, background
) -> None:
    logits = torch.full((3, 1030), background, dtype=dtype)
    logits[:, 700] = 1.0
    ids = torch.full((3,), 700, device=device)
    token_logprobs(logits.to(device), ids)
    ops.check_status()
    logits[1, column] = math.nan
    with raises_value_error(rf"logits: .*nan.*\[1, {column}\]"):
        token_logprobs(logits.to(device), ids)


def test_nan_of_any_bit_pattern_is_found(device, token_logprobs, raises_value_error) -> None:
    bits = torch.zeros(1, 600, dtype=torch.int32)
    for pattern in (-1, 0x7FFFFFFF, 0x7F800001, -0x7FFFFF):
        bits[0, 300] = pattern
        assert bool(bits.view(torch.float32)[0, 300].isnan())
        with raises_value_error("logits"):
            token_logprobs(
                bits.view(torch.float32).to(device),
                torch.zeros(1, dtype=torch.int64, device=device),
            )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logits": torch.full((2, 4), math.inf)}, r"logits: .*below \+inf.*inf at \[0, 0\]"),
        ({"logits": torch.full((2, 4), -math.inf)}, "logits: .*finite.*row 0"),
        # Too large divided by the temperature: +inf, and -inf.
        ({"logits": torch.full((2, 4), 5.0), "temperature": 1e-38}, "logits: .*finite.*row 0"),
        ({"logits": torch.full((2, 4), -5.0), "temperature": 1e-38}, "logits: .*finite.*row 0"),
        ({"logits": torch.zeros(2, 4).double()}, "logits: .*float"),
        ({"logits": torch.zeros(2, 4, 1)}, "logits"),
        ({"logits": torch.zeros(2, 0)}, "logits: .*at least one"),
        ({"logits": torch.zeros(4, 2).t()}, "logits"),
        ({"token_ids": torch.tensor([0, 4])}, "token_ids: .*0 <= value < 4, got 4 at index 1"),
        ({"token_ids": torch.tensor([-1, 0])}, "token_ids: .*got -1 at index 0"),
        ({"token_ids": torch.tensor([0, 1, 2])}, "token_ids"),
        ({"token_ids": torch.tensor([0.0, 1.0])}, "token_ids"),
        ({"temperature": -1.0}, "temperature: .*got -1"),
        ({"temperature": math.nan}, "temperature: .*nan"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": torch.tensor([1.0, -2.0])}, "temperature: .*got -2 at index 1"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"temperature": torch.ones(2).double()}, "temperature"),
    ],
)
def test_errors_name_the_argument(
    device, token_logprobs, raises_value_error, change, match
) -> None:
    args = {"logits": torch.zeros(2, 4), "token_ids": torch.tensor([0, 3])}
    moved = {k: v.to(device) for k, v in args.items()}
    token_logprobs(**moved)
    changed = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with raises_value_error(match):
        token_logprobs(**{**moved, **changed})


@pytest.mark.slow
def test_opcheck(device, impl, generator) -> None:
    logits, ids = _case(3, 20, torch.bfloat16, generator)
    name = {"native": "token_logprobs", "triton": "token_logprobs_triton"}[impl]
    opcheck(
        *(
            (name, (logits.to(device), ids.to(device), temperatures, 0.7))
            for temperatures in (None, torch.ones(3, device=device))
        )
    )
