"""verify_prefix against its reference, hand-computed cases, `sample_tokens`, and itself in
chunks."""

from __future__ import annotations

import math

import pytest
import torch
from laws import assert_rate
from opchecks import opcheck

from spec_rollout import _C, ops
from spec_rollout.acceptance import Coupled, Lenient, NoReuse, OneHot, RandomCut
from spec_rollout.ops.reference import logits as reference
from spec_rollout.packed import cu_lens_from

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = [
    Lenient(0.0),
    Lenient(0.5),
    Lenient(-0.4, scale=0.7),
    Lenient(0.3, min_target_prob=0.05),
    Lenient(INF),
    Lenient(-INF),
    Coupled(),
    Coupled(1.0),
    Coupled(-1.0),
    Coupled(INF),
    OneHot(),
    RandomCut(),
    NoReuse(),
]
LEFT_OUT = "left out in Triton's interpreter, for time"
# Those that differ in what a draw is.
INTERPRETED_RULES = [Lenient(0.0), Coupled(), OneHot()]
SAMPLINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 4},
    {"top_p": 0.8},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
]


def _case(lens, vocab, dtype, generator, bonus=None, drift=0.3):
    """Drafts drawn from logits that then drift, so that acceptance is neither rare nor certain."""
    lens = torch.tensor(lens)
    batch, tokens = len(lens), int(lens.sum())
    bonus = torch.ones(batch, dtype=torch.int64) if bonus is None else torch.tensor(bonus)
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    positions = torch.randint(0, 2**36, (batch,), generator=generator)
    cu_logits = cu_lens_from(lens + bonus)
    old = torch.randn(int(cu_logits[-1]), vocab, generator=generator) * 1.5
    logits = (old + drift * torch.randn(old.shape, generator=generator)).to(dtype)
    row_of = torch.repeat_interleave(torch.arange(batch), lens)
    index = torch.arange(tokens) - cu_lens_from(lens)[row_of]  # within the draft
    drafted = old[cu_logits[row_of] + index]
    draft_ids, draft_logprobs = ops.sample_tokens(
        drafted, keys=keys[row_of], positions=positions[row_of] + index
    )
    return {
        "logits": logits,
        "draft_ids": draft_ids,
        "cu_draft_lens": cu_lens_from(lens),
        "keys": keys,
        "positions": positions,
        "draft_logprobs": draft_logprobs,
        "cu_logits_lens": cu_logits,
    }


def _to(case, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def _assert_same(got, expected) -> None:
    assert torch.equal(got[0].cpu(), expected[0].cpu())
    assert torch.equal(got[1].cpu(), expected[1].cpu())
    torch.testing.assert_close(
        got[2].double().cpu(), expected[2].double().cpu(), atol=4e-6, rtol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_reference(
    device, impl, interpreted, verify_prefix, rule, sampling, generator
) -> None:
    if interpreted and sampling and not (rule in INTERPRETED_RULES and len(sampling) != 1):
        pytest.skip(LEFT_OUT)
    # Drafts of no, one and many tokens, with and without bonus logits, and a row with nothing at
    # all.
    case = _case(
        [0, 1, 2, 1, 1, 3, 0, 1] if interpreted else [0, 1, 12, 5, 1, 30, 0, 9],
        40,
        torch.float32,
        generator,
        bonus=[1, 1, 1, 0, 0, 1, 0, 1],
    )
    got = verify_prefix(**_to(case, device), rule=rule, **sampling)
    assert got.accepted_lens.dtype == got.next_token_ids.dtype == torch.int32
    assert got.logprobs.dtype == torch.float32
    _assert_same(got, reference.verify_prefix(**case, rule=rule, **sampling))


# 1: nothing to choose; 7 and 1000: partial vectors; 151936: a real vocabulary.
@pytest.mark.parametrize(
    ("lens", "vocab"), [([3, 2], 1), ([20, 9, 0], 7), ([8], 1000), ([3], 151936)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [Lenient(0.2), Coupled(), OneHot()], ids=str)
def test_dtypes_and_vocabularies(
    device, interpreted, verify_prefix, lens, vocab, dtype, rule, generator
) -> None:
    if interpreted and dtype != torch.bfloat16 and rule != Coupled():
        pytest.skip(LEFT_OUT)
    if interpreted:
        lens = [min(n, 2) for n in lens]
    case = _case(lens, vocab, dtype, generator, drift=0.1)
    for sampling in ({}, {"temperature": 0.9, "top_k": 50, "top_p": 0.95}):
        if interpreted and sampling and vocab != 7:
            continue
        got = verify_prefix(**_to(case, device), rule=rule, **sampling)
        _assert_same(got, reference.verify_prefix(**case, rule=rule, **sampling))


def test_the_cases_exercise_both_outcomes(generator) -> None:
    """Guards the tests above: their drafts are partly accepted, under every rule that can."""
    for rule in (Lenient(0.0), Coupled(), OneHot()):
        case = _case([30] * 20, 40, torch.float32, generator)
        accepted = ops.verify_prefix(**case, rule=rule).accepted_lens
        assert int((accepted > 0).sum()) > 0
        assert 0 < int(accepted.sum()) < 20 * 30
        assert int((accepted < 30).sum()) > 0


def test_default_layout_has_a_bonus_row_each(device, verify_prefix, generator) -> None:
    case = _to(_case([4, 0, 7], 30, torch.bfloat16, generator), device)
    explicit = verify_prefix(**case, rule=Coupled())
    del case["cu_logits_lens"]
    case["cu_draft_lens"] = case["cu_draft_lens"].int()
    case["draft_ids"] = case["draft_ids"].long()
    _assert_same(verify_prefix(**case, rule=Coupled()), explicit)
    at_zero = verify_prefix(**{**case, "positions": None}, rule=Coupled())
    zeros = torch.zeros_like(case["positions"]).int()
    _assert_same(verify_prefix(**{**case, "positions": zeros}, rule=Coupled()), at_zero)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_coupled_gives_what_plain_sampling_gives(
    device, impl, interpreted, verify_prefix, sampling, generator
) -> None:
    """The accepted prefix and the next token are `sample_tokens` of each logits row, whatever the
    draft was."""
    batch, length = (2, 3) if interpreted else (12, 25)
    case = _to(_case([length] * batch, 50, torch.bfloat16, generator), device)
    rows = torch.arange(batch, device=device).repeat_interleave(length + 1)
    offsets = torch.arange(length + 1, device=device).repeat(batch)
    plain = ops.sample_tokens(
        case["logits"],
        keys=case["keys"][rows],
        positions=case["positions"][rows] + offsets,
        **sampling,
    )
    shape = (batch, length + 1)
    tokens, logprobs = plain.token_ids.view(shape), plain.logprobs.view(shape)
    got = verify_prefix(**case, rule=Coupled(), **sampling)
    drafts = case["draft_ids"].view(batch, length)
    # Another implementation adds up a row in another order.
    atol = 0.0 if impl == "native" else 4e-6
    for r, n in enumerate(got.accepted_lens.tolist()):
        assert torch.equal(drafts[r, :n], tokens[r, :n])
        assert n == length or drafts[r, n] != tokens[r, n]
        assert got.next_token_ids[r] == tokens[r, n]
        torch.testing.assert_close(
            got.logprobs.view(shape)[r, : n + 1], logprobs[r, : n + 1], atol=atol, rtol=0
        )
    # A draft that plain sampling made is accepted whole.
    case["draft_ids"] = tokens[:, :length].reshape(-1)
    again = verify_prefix(**case, rule=Coupled(), **sampling)
    assert again.accepted_lens.tolist() == [length] * batch
    assert torch.equal(again.next_token_ids, tokens[:, length])


@pytest.mark.parametrize("rule", [*RULES[:4], Coupled(), Coupled(0.5), OneHot()], ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_give_what_the_whole_gives(
    device, interpreted, verify_prefix, rule, chunk, generator
) -> None:
    if interpreted and (chunk != 3 or rule not in INTERPRETED_RULES):
        pytest.skip(LEFT_OUT)
    batch, length, vocab = (2, 4, 30) if interpreted else (16, 24, 30)
    sampling = {} if interpreted else {"top_p": 0.95}
    case = _to(_case([length] * batch, vocab, torch.float32, generator), device)
    logits = case["logits"].view(batch, length + 1, vocab)
    ids, old = case["draft_ids"].view(batch, length), case["draft_logprobs"].view(batch, length)
    whole = verify_prefix(**case, rule=rule, **sampling)
    for r in range(batch):
        logprobs, next_token, done = [], -1, 0
        while done < length:
            size = min(chunk, length - done)
            last = done + size == length  # only then are there bonus logits
            got = verify_prefix(
                logits[r, done : done + size + last],
                ids[r, done : done + size].contiguous(),
                torch.tensor([0, size], device=device),
                rule=rule,
                keys=case["keys"][r : r + 1],
                positions=case["positions"][r : r + 1] + done,
                draft_logprobs=old[r, done : done + size].contiguous(),
                cu_logits_lens=torch.tensor([0, size + last], device=device),
                **sampling,
            )
            n = int(got.accepted_lens)
            next_token = int(got.next_token_ids)
            logprobs += got.logprobs[: n + (next_token >= 0)].tolist()
            done += n
            if n < size:
                break
        assert done == int(whole.accepted_lens[r])
        assert next_token == int(whole.next_token_ids[r])
        expected = whole.logprobs.view(batch, length + 1)[r, : done + 1]
        assert torch.equal(torch.tensor(logprobs), expected.cpu())


def test_rows_after_a_rejection_are_not_read_on_cpu(generator) -> None:
    case = _case([10] * 6, 20, torch.float32, generator)
    for rule in (Lenient(-0.5), Coupled(), OneHot(), NoReuse()):
        clean = ops.verify_prefix(**case, rule=rule)
        poisoned = {k: v.clone() for k, v in case.items()}
        for r, n in enumerate(clean.accepted_lens.tolist()):
            poisoned["logits"][r * 11 + n + 1 : (r + 1) * 11] = math.nan
            poisoned["draft_logprobs"][r * 10 + n + 1 : (r + 1) * 10] = math.nan
        _assert_same(ops.verify_prefix(**poisoned, rule=rule), clean)


def test_full_reuse_and_no_reuse(device, impl, verify_prefix, generator) -> None:
    case = _to(_case([6, 0, 3], 15, torch.float32, generator), device)
    plain_keys = {"keys": case["keys"], "positions": case["positions"]}
    for rule in (Lenient(INF), Coupled(INF), RandomCut()):
        got = verify_prefix(**case, rule=rule)
        assert got.accepted_lens.tolist() == [6, 0, 3]
        assert not got.logprobs.isnan().any()
        ids = case["draft_ids"][:6]
        expected = ops.token_logprobs(case["logits"][:6], ids, impl=impl)
        # Two CUDA kernels take a row's sum in two orders.
        tolerance = 0.0 if device == "cpu" else 5e-7
        torch.testing.assert_close(got.logprobs[:6], expected, atol=tolerance, rtol=tolerance)
    first_rows = case["logits"][case["cu_logits_lens"][:-1]]
    fresh = ops.sample_tokens(first_rows, **plain_keys)
    got = verify_prefix(**case, rule=NoReuse())
    assert got.accepted_lens.tolist() == [0, 0, 0]
    assert torch.equal(got.next_token_ids, fresh.token_ids)


def _one(weights, token, rule, device, draws=3000, draft_prob=None, impl="native", **sampling):
    """One-token drafts, over many keys: (accepted [draws], next tokens [draws], log-probs
    [draws])."""
    logits = torch.tensor(weights).log()[None].expand(draws, -1).to(device)
    got = ops.verify_prefix(
        logits,
        torch.full((draws,), token, device=device),
        torch.arange(draws + 1, device=device),
        rule=rule,
        keys=torch.arange(draws, device=device) * 7919,
        draft_logprobs=None
        if draft_prob is None
        else torch.full((draws,), draft_prob).log().to(device),
        cu_logits_lens=torch.arange(draws + 1, device=device),
        impl=impl,
        **sampling,
    )
    return tuple(t.cpu() for t in got)


def test_a_filtered_out_draft_is_rejected(device, impl, interpreted) -> None:
    draws = 2 if interpreted else 3000
    for sampling in ({"top_k": 2}, {"top_p": 0.7}):
        for rule in (Lenient(3.0), Coupled(), Coupled(5.0), OneHot()):
            accepted, next_ids, logprobs = _one(
                [0.5, 0.3, 0.2], 2, rule, device, draws, draft_prob=1e-6, impl=impl, **sampling
            )
            assert not accepted.any()
            assert set(next_ids.tolist()) == {0, 1} or (interpreted and 2 not in next_ids)
            torch.testing.assert_close(
                logprobs.exp(), torch.tensor([0.625, 0.375])[next_ids.long()]
            )


def test_a_draft_the_target_cannot_produce_is_rejected(device, impl, interpreted) -> None:
    draws = 12 if interpreted else 3000
    for rule in (Lenient(3.0), Coupled(), OneHot()):
        accepted, next_ids, _ = _one([0.4, 0.0, 0.6], 1, rule, device, draws, 0.5, impl)
        assert not accepted.any()
        assert set(next_ids.tolist()) == {0, 2}


def test_acceptance_rates_by_hand(device) -> None:
    for rule, token, draft_prob, expected in (
        (Lenient(0.0), 1, 0.6, 0.5),  # p / q
        (Lenient(math.log(1.5)), 1, 0.6, 0.75),  # lenience times p / q
        (Lenient(0.0), 1, 0.2, 1.0),  # p > q
        (Lenient(0.0, scale=2.0), 1, 0.6, 0.25),  # squared
        (Lenient(0.0, min_target_prob=0.31), 1, 0.1, 0.0),  # p is below
        (Lenient(0.0, min_target_prob=0.29), 1, 0.1, 1.0),
        (OneHot(), 1, None, 0.3),
        (Coupled(), 1, None, 0.3),
        # y wins iff e^b p_y of the total mass (e^b p_y + 1 - p_y) comes first
        (Coupled(math.log(2.0)), 1, None, 0.6 / 1.3),
    ):
        accepted, _, _ = _one([0.5, 0.3, 0.2], token, rule, device, 20_000, draft_prob)
        assert_rate(accepted.cpu(), expected)


def test_one_hot_never_returns_the_rejected_token(device, impl, interpreted) -> None:
    draws = 40 if interpreted else 3000
    accepted, next_ids, _ = _one([0.5, 0.3, 0.2], 0, OneHot(), device, draws, impl=impl)
    assert_rate(accepted.cpu(), 0.5)
    assert set(next_ids[accepted == 0].tolist()) == {1, 2}
    assert set(next_ids[accepted == 1].tolist()) == {-1}


@pytest.mark.parametrize(
    "rule", [Lenient(0.0), Lenient(-5.0), OneHot(), Coupled(), Coupled(-5.0)], ids=str
)
def test_the_only_token(device, impl, interpreted, rule) -> None:
    """A vocabulary of one, or one token left by masks or filters."""
    for weights, token, sampling in (
        ([1.0], 0, {}),
        ([0.0, 1.0, 0.0], 1, {}),
        ([0.1, 0.8, 0.1], 1, {"top_k": 1}),
        ([0.1, 0.8, 0.1], 1, {"top_p": 0.5}),
    ):
        accepted, next_ids, logprobs = _one(
            weights, token, rule, device, 2 if interpreted else 50, 1.0, impl, **sampling
        )
        if rule == Lenient(-5.0):  # accepts with probability e^-5 at p = q = 1
            assert set(next_ids.tolist()) <= {token, -1}
        else:
            assert accepted.all()
            assert (next_ids == -1).all()
        assert (logprobs == 0.0).all()


def test_the_only_token_passes_the_hardest_test(device, impl, interpreted) -> None:
    """Its log-prob is 0, not a rounding below: where ln u is 0 as well, it would be rejected, with
    no other to draw."""
    key = torch.tensor([16390493], device=device)
    assert _C.uniform_from_bits(_C.accept_bits(int(key), 0)) == 1.0
    one = torch.tensor([0, 1], device=device)
    for logit in torch.linspace(-60, 60, 5 if interpreted else 200).tolist():
        logits = torch.full((1, 40), -INF, device=device)
        logits[0, 3] = logit
        for sampling in ({}, {"temperature": 0.7}, {"top_p": 0.9}):
            got = ops.verify_prefix(
                logits, one[:1] + 3, one, rule=OneHot(), keys=key, cu_logits_lens=one, impl=impl,
                **sampling,
            )  # fmt: skip
            assert [t.tolist() for t in got] == [[1], [-1], [0.0]]
    ops.check_status()


def test_greedy(device, verify_prefix) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 1.0, 2.0], [5.0, 1.0, 2.0]], device=device)
    common = {
        "logits": logits,
        "cu_draft_lens": torch.tensor([0, 2], device=device),
        "keys": torch.zeros(1, dtype=torch.int64, device=device),
        "draft_logprobs": torch.zeros(2, device=device),
        "temperature": 0.0,
    }
    logp = logits.log_softmax(-1).cpu()
    for rule in (Lenient(0.0), Lenient(2.0), Coupled(), Coupled(9.0), OneHot()):
        # ties: the lowest id is the argmax
        got = verify_prefix(draft_ids=torch.tensor([1, 2], device=device), rule=rule, **common)
        assert (got.accepted_lens.item(), got.next_token_ids.item()) == (2, 0)
        torch.testing.assert_close(
            got.logprobs.cpu(), torch.stack([logp[0, 1], logp[1, 2], logp[2, 0]])
        )
        got = verify_prefix(draft_ids=torch.tensor([2, 2], device=device), rule=rule, **common)
        assert (got.accepted_lens.item(), got.next_token_ids.item()) == (0, 1)
        assert got.logprobs.isnan().tolist() == [False, True, True]
    for rule in (Lenient(INF), Coupled(INF)):
        got = verify_prefix(draft_ids=torch.tensor([0, 0], device=device), rule=rule, **common)
        assert got.accepted_lens.item() == 2
    got = verify_prefix(draft_ids=torch.tensor([1, 2], device=device), rule=Lenient(-INF), **common)
    assert (got.accepted_lens.item(), got.next_token_ids.item()) == (0, 1)


def test_equal_logits_of_several_blocks_give_the_lowest_id(device, verify_prefix) -> None:
    logits = torch.full((3, 20_000), 1.5, dtype=torch.bfloat16, device=device)
    got = verify_prefix(
        logits,
        torch.tensor([0, 9000], device=device),
        torch.tensor([0, 2], device=device),
        rule=Coupled(),
        keys=torch.zeros(1, dtype=torch.int64, device=device),
        temperature=0.0,
    )
    assert (got.accepted_lens.item(), got.next_token_ids.item()) == (1, 0)


def test_per_row_parameters_equal_single_rows(
    device, interpreted, verify_prefix, generator
) -> None:
    lens = [1, 2, 1, 1] if interpreted else [9, 4, 12, 7]
    case = _to(_case(lens, 60, torch.bfloat16, generator), device)
    temperature = torch.tensor([0.0, 0.8, 1.0, 1.3], device=device)
    top_k = torch.tensor([3, 20, 0, 5], device=device)
    top_p = torch.tensor([0.5, 1.0, 0.9, 0.95], device=device)
    for rule in (Lenient(0.1), Coupled(), OneHot()):
        got = verify_prefix(**case, rule=rule, temperature=temperature, top_k=top_k, top_p=top_p)
        for r in range(4):
            tokens = slice(int(case["cu_draft_lens"][r]), int(case["cu_draft_lens"][r + 1]))
            rows = slice(int(case["cu_logits_lens"][r]), int(case["cu_logits_lens"][r + 1]))
            alone = verify_prefix(
                case["logits"][rows],
                case["draft_ids"][tokens],
                torch.tensor([0, tokens.stop - tokens.start], device=device),
                rule=rule,
                keys=case["keys"][r : r + 1],
                positions=case["positions"][r : r + 1],
                draft_logprobs=case["draft_logprobs"][tokens],
                temperature=float(temperature[r]),
                top_k=int(top_k[r]),
                top_p=float(top_p[r]),
            )
            assert alone.accepted_lens[0] == got.accepted_lens[r]
            assert alone.next_token_ids[0] == got.next_token_ids[r]
            torch.testing.assert_close(
                alone.logprobs, got.logprobs[rows], atol=0, rtol=0, equal_nan=True
            )


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_logits(device, interpreted, verify_prefix, dtype, offset, generator) -> None:
    if interpreted and dtype != torch.bfloat16:
        pytest.skip(LEFT_OUT)
    case = _to(_case([1, 1] if interpreted else [9, 3], 1001, dtype, generator), device)
    logits = case.pop("logits")
    buffer = torch.full((logits.shape[0], 1020), math.nan, dtype=dtype, device=device)
    buffer[:, offset : offset + 1001] = logits
    for rule in (Lenient(0.1), Coupled()):
        strided = verify_prefix(buffer[:, offset : offset + 1001], **case, rule=rule)
        _assert_same(strided, verify_prefix(logits, **case, rule=rule))


def test_nothing_to_verify(device, verify_prefix) -> None:
    empty = torch.empty(0, dtype=torch.int64, device=device)
    got = verify_prefix(
        torch.empty(0, 5, device=device),
        empty,
        torch.zeros(1, dtype=torch.int64, device=device),
        rule=Coupled(),
        keys=empty,
    )
    assert [t.shape for t in got] == [(0,)] * 3
    # Rows without draft or logits: nothing accepted, nothing drawn.
    got = verify_prefix(
        torch.empty(0, 5, device=device),
        empty,
        torch.zeros(3, dtype=torch.int64, device=device),
        rule=Coupled(),
        keys=torch.zeros(2, dtype=torch.int64, device=device),
        cu_logits_lens=torch.zeros(3, dtype=torch.int64, device=device),
    )
    assert got.accepted_lens.tolist() == [0, 0]
    assert got.next_token_ids.tolist() == [-1, -1]


def _tensor(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logits": torch.zeros(5, 4)}, "logits: .*6 rows"),
        ({"logits": torch.zeros(6, 4, dtype=torch.float64)}, "logits"),
        ({"logits": torch.full((6, 4), math.nan)}, r"logits: .*nan at \[0, 0\]"),
        # Too large divided by the temperature.
        ({"logits": torch.full((6, 4), 5.0), "temperature": 1e-38}, "logits: .*finite.*row 0"),
        ({"draft_ids": _tensor(0, 1, 2, 4)}, "draft_ids: .*0 <= value < 4, got 4 at index 3"),
        ({"draft_ids": _tensor(0, -1, 2, 3)}, "draft_ids: .*got -1 at index 1"),
        ({"draft_ids": _tensor(0, 1, 2)}, "logits|draft_logprobs|cu_draft_lens"),
        ({"cu_draft_lens": _tensor(1, 3, 4)}, "cu_draft_lens: .*start at 0"),
        ({"cu_draft_lens": _tensor(0, 5, 4)}, "cu_draft_lens: .*5 then 4"),
        ({"cu_draft_lens": _tensor(0, 3, 3)}, "cu_draft_lens: .*end at 4, got 3"),
        ({"cu_draft_lens": _tensor(0, 4)}, r"logits: .*num_draft_tokens \+ batch = 5"),
        ({"cu_logits_lens": _tensor(0, 3, 5)}, "cu_logits_lens: .*end at 6"),
        ({"cu_logits_lens": _tensor(0, 1, 6)}, "cu_logits_lens: .*3 or 4 logits rows.*got 1"),
        ({"cu_logits_lens": _tensor(0, 5, 6)}, "cu_logits_lens: .*3 or 4 logits rows.*got 5"),
        ({"keys": _tensor(0)}, "keys|cu_draft_lens"),
        ({"positions": _tensor(0.0, 0.0)}, "positions"),
        ({"draft_logprobs": None}, "draft_logprobs: expected a tensor for Lenient, got None"),
        ({"draft_logprobs": torch.full((4,), math.nan)}, "draft_logprobs: .*NaN at index"),
        ({"draft_logprobs": torch.zeros(4).double()}, "draft_logprobs"),
        ({"draft_logprobs": torch.zeros(3)}, "draft_logprobs"),
        ({"temperature": -1.0}, "temperature: .*got -1"),
        ({"temperature": _tensor(1.0, -1.0)}, "temperature: .*got -1 at index 1"),
        ({"top_k": _tensor(1, -3)}, "top_k: .*got -3 at index 1"),
        ({"top_p": 0.0}, "top_p: .*got 0"),
        ({"top_p": _tensor(0.5, 2.0)}, "top_p: .*got 2 at index 1"),
    ],
)
def test_errors_name_the_argument(device, verify_prefix, raises_value_error, change, match) -> None:
    args = {
        "logits": torch.zeros(6, 4),
        "draft_ids": _tensor(0, 1, 2, 3),
        "cu_draft_lens": _tensor(0, 3, 4),
        "keys": _tensor(5, 6),
        "draft_logprobs": torch.full((4,), -30.0),  # all are accepted, so all are looked at
        "rule": Lenient(0.0),
    }
    verify_prefix(**_to(args, device))
    with raises_value_error(match):
        verify_prefix(**_to({**args, **change}, device))


@pytest.mark.slow
def test_opcheck(device, impl, interpreted, generator) -> None:
    case = _to(_case([3, 0, 2], 20, torch.float32, generator), device)
    name = {"native": "verify_prefix", "triton": "verify_prefix_triton"}[impl]
    names = ("logits", "draft_ids", "cu_draft_lens", "draft_logprobs", "cu_logits_lens", "keys")
    inputs = [case[name] for name in names]
    rule = (0, 0.1, 1.0, 0.0)
    ones = torch.ones(3, device=device)
    checks = [
        (
            name,
            (*inputs, case["positions"], ones, 1.0, ones.int(), 0, ones, 1.0, *rule),
            {"test_utils": ("test_schema", "test_faketensor")},
        )
    ]
    # NaN marks rows without a decision, which opcheck cannot compare: full reuse leaves none.
    if not interpreted:  # it makes a dozen calls
        checks.append((name, (*inputs, None, None, 1.0, None, 0, None, 1.0, 0, INF, 1.0, 0.0), {}))
    opcheck(*checks)
