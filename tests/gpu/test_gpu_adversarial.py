"""Inputs that break kernels over logits: degenerate distributions, odd layouts, and more elements
than 32 bits count."""

from __future__ import annotations

import math

import pytest
import torch

from spec_rollout import ops
from spec_rollout.acceptance import Coupled, Lenient, OneHot
from spec_rollout.ops.reference import logits as reference
from spec_rollout.packed import cu_lens_from

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of an odd vocabulary, one below a vector, several blocks, and real ones of which one is no
# multiple of a vector.
VOCABS = [1, 3, 1003, 32_000, 50_257, 151_936]


@pytest.fixture(params=["native", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def _logits(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    noise = torch.randn(rows, vocab, generator=generator)
    at = torch.arange(rows) * 7919 % vocab
    if kind == "equal":
        noise = torch.full((rows, vocab), 1.5)
    elif kind == "one token left":
        noise = torch.full((rows, vocab), -INF)
        noise[torch.arange(rows), at] = 0.5
    elif kind == "half masked":
        noise[:, ::2] = -INF
        noise[:, -1] = 0.0
    elif kind == "one far above":
        noise[torch.arange(rows), at] = 200.0
    elif kind == "large":
        noise = noise * 1e4
    return noise.to(dtype)


KINDS = ["random", "equal", "one token left", "half masked", "one far above", "large"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_token_logprobs_and_sample_tokens_equal_the_cpu(impl, vocab, dtype, kind) -> None:
    rows = 37
    logits = _logits(kind, rows, vocab, dtype)
    ids = torch.arange(rows) * 104_729 % vocab
    got = ops.token_logprobs(logits.cuda(), ids.cuda(), impl=impl).cpu()
    torch.testing.assert_close(got, ops.token_logprobs(logits, ids), atol=4e-6, rtol=1e-6)
    if impl == "triton":
        return
    keys, positions = torch.arange(rows) * 7919, torch.arange(rows)
    for sampling in ({}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}, {"temperature": 0.0}):
        expected = ops.sample_tokens(logits, keys=keys, positions=positions, **sampling)
        drawn = ops.sample_tokens(
            logits.cuda(), keys=keys.cuda(), positions=positions.cuda(), **sampling
        )
        assert torch.equal(drawn.token_ids.cpu(), expected.token_ids)
        torch.testing.assert_close(drawn.logprobs.cpu(), expected.logprobs, atol=4e-6, rtol=1e-6)
    ops.check_status()


# Few drafts are split over many blocks, many are not.
@pytest.mark.parametrize("lens", [[40], [3, 0, 9, 1], [4] * 700])
@pytest.mark.parametrize("outcome", ["all accepted", "first rejected", "mixed"])
@pytest.mark.parametrize("rule", [Lenient(0.0), Coupled(), OneHot()], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1003])
def test_verify_prefix_equals_the_cpu(impl, lens, outcome, rule, vocab) -> None:
    generator = torch.Generator().manual_seed(len(lens) + vocab)
    lens = torch.tensor(lens)
    batch, tokens = len(lens), int(lens.sum())
    cu = cu_lens_from(lens)
    logits = (torch.randn(tokens + batch, vocab, generator=generator) * 2).bfloat16()
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    row_of = torch.repeat_interleave(torch.arange(batch), lens)
    index = torch.arange(tokens) - cu[row_of]
    drafted = logits[cu[row_of] + row_of + index]
    drafts, old = ops.sample_tokens(drafted, keys=keys[row_of], positions=index)
    drafts = drafts.long()
    wrong = {"all accepted": 0.0, "first rejected": 1.0, "mixed": 0.2}[outcome]
    replaced = torch.rand(tokens, generator=generator) < wrong
    drafts = torch.where(replaced, (drafts + 1) % vocab, drafts)
    args = {"rule": rule, "keys": keys, "draft_logprobs": torch.where(replaced, 0.0, old)}
    expected = ops.verify_prefix(logits, drafts, cu, **args)
    if outcome == "all accepted" and not isinstance(rule, OneHot):
        assert torch.equal(expected.accepted_lens.long(), lens)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    for _ in range(3):  # blocks run in another order each time
        got = ops.verify_prefix(logits.cuda(), drafts.cuda(), cu.cuda(), impl=impl, **moved)
        assert torch.equal(got.accepted_lens.cpu(), expected.accepted_lens)
        assert torch.equal(got.next_token_ids.cpu(), expected.next_token_ids)
        torch.testing.assert_close(
            got.logprobs.cpu(), expected.logprobs, atol=4e-6, rtol=1e-6, equal_nan=True
        )
    ops.check_status()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_apart(impl, dtype) -> None:
    """Row offsets beyond 2**31 elements, with an unaligned view: the largest row is read where it
    is."""
    rows, vocab = 3, 1003
    stride = 2**31 // 2 + 1
    needed = ((rows - 1) * stride + vocab) * torch.empty(0, dtype=dtype).element_size()
    if torch.cuda.mem_get_info()[0] < needed + (1 << 30):
        pytest.skip(f"needs {needed >> 30} GiB of device memory")
    buffer = torch.empty((rows - 1) * stride + vocab, dtype=dtype, device="cuda")
    view = buffer.as_strided((rows, vocab), (stride, 1))
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
    view.copy_(logits)
    ids = torch.tensor([0, 500, 1002])
    got = ops.token_logprobs(view, ids.cuda(), impl=impl).cpu()
    torch.testing.assert_close(got, ops.token_logprobs(logits, ids), atol=4e-6, rtol=1e-6)


def test_more_elements_than_32_bits_count(impl) -> None:
    rows, vocab = 14_200, 151_936  # 2.16e9 elements
    if torch.cuda.mem_get_info()[0] < 2 * rows * vocab + (2 << 30):
        pytest.skip(f"needs {2 * rows * vocab >> 30} GiB of device memory")
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda").normal_(0, 3)
    ids = torch.randint(0, vocab, (rows,), device="cuda")
    logprobs = ops.token_logprobs(logits, ids, impl=impl)
    cu = torch.tensor([0, rows - 1], device="cuda")
    keys = torch.tensor([5], device="cuda")
    whole = ops.verify_prefix(logits, ids[: rows - 1], cu, rule=Lenient(INF), keys=keys, impl=impl)
    assert whole.accepted_lens.item() == rows - 1
    for few in (slice(0, 3), slice(rows - 3, rows)):
        truth = reference.token_logprobs(logits[few].cpu(), ids[few].cpu())
        torch.testing.assert_close(logprobs[few].double().cpu(), truth, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(whole.logprobs[:-1], logprobs[:-1], atol=4e-6, rtol=1e-6)
    drawn = ops.sample_tokens(
        logits[-1:], keys=keys, positions=torch.tensor([rows - 1], device="cuda")
    )
    assert whole.next_token_ids.item() == drawn.token_ids.item()
    ops.check_status()
