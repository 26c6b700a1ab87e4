"""KV storage, attention and forwards of the embedded engine, below the engine itself."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import SAMPLING, VOCAB, build, random_requests

from spec_rollout.acceptance import Coupled
from spec_rollout.engines import TransformersEngine
from spec_rollout.engines.transformers.attention import batch_invariant_attention, span_mask
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.slot_cache import SlotCache, copy_rows

LENS = [7, 30, 1, 19, 12]


def feed(
    forward: ModelForward, cache: SlotCache, rows: list[list[int]], starts: list[int]
) -> torch.Tensor:
    """Logits of every row's last token."""
    first, count = torch.tensor(starts), torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([token for row in rows for token in row])
    end = int((first + count).max())
    return forward(cache, tokens, first, count, end, count.cumsum(0) - 1)


@pytest.fixture
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB, (length + 1,), generator=generator).tolist() for length in LENS]


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "mistral_sliding"])
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_rows_of_different_lengths_go_on_independently(rows, name, batch_invariant) -> None:
    """Prefill, then one token each at per-row positions: the logits of a plain forward."""
    model = build(name)
    forward = ModelForward(model, batch_invariant)
    cache = forward.new_cache(16, 64)
    with forward.session():
        feed(forward, cache, [row[:-1] for row in rows], [0] * len(rows))
        logits = feed(forward, cache, [row[-1:] for row in rows], LENS)
    for row, actual in zip(rows, logits, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([row])).logits[0, -1]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_spliced_rows_continue_like_fresh_ones(rows) -> None:
    """Accepted prefixes moved to other rows of another cache, and then within it."""
    forward = ModelForward(build("qwen3"))
    lanes = forward.new_cache(5, 64)
    slots = forward.new_cache(9, 48)
    kept = [4, 30, 1, 10, 0]  # some rows are cut
    with forward.session():
        feed(forward, lanes, [row[:-1] for row in rows], [0] * 5)
        copy_rows(lanes, slots, [0, 1, 2, 3], [6, 0, 3, 8], kept[:4])
        slots.move_rows([6, 8], [1, 2], [4, 10])
        order = [1, 0, 3, 2]
        fed = [rows[row][kept[row] : kept[row] + 1] for row in order]
        actual = feed(forward, slots, fed, [kept[row] for row in order])
        for row, logits in zip(order, actual, strict=True):
            fresh = forward.new_cache(16, 48)
            # Computed beside others, for the bits to agree.
            expected = feed(forward, fresh, [rows[row][: kept[row] + 1]] * 16, [0] * 16)[0]
            assert torch.equal(logits, expected)


def test_writes_touch_no_other_row_or_position() -> None:
    cache = SlotCache(1, 4, 32)
    positions = torch.tensor([[3, 4], [10, 11]])
    states = torch.randn(2, 3, 2, 8)  # rows, heads, tokens, head_dim
    cache.place(positions, 16)
    keys, values = cache.update(states, -states, 0)
    assert keys.shape == values.shape == (2, 3, 16, 8)
    expected = torch.zeros(4, 3, 32, 8)
    for row, token in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected[row, :, positions[row, token]] = states[row, :, token]
    assert torch.equal(cache.layers[0].keys, expected)
    assert torch.equal(cache.layers[0].values, -expected)


def test_writes_by_span_touch_no_other_row_or_position() -> None:
    """Rows in any order, padding left out, one row of the cache given twice."""
    cache = SlotCache(1, 4, 32, by_span=True)
    spans = torch.tensor([[3, 4, 0, 2], [10, 10, 0, 0], [5, 6, 0, 2]])
    states = torch.randn(3, 2, 3, 8).transpose(1, 2)  # rows, heads, tokens, head_dim
    cache.place(spans[:, :1], 16, spans)
    before = torch.full_like(states, torch.nan)
    cache.layers[0].lazy_initialization(before, before)
    for tensor in (cache.layers[0].keys, cache.layers[0].values):
        tensor.fill_(7.0)
    keys, values = cache.update(states, -states, 0)
    assert keys.shape == values.shape == (5, 3, 16, 8)  # the last row is for padding
    expected = torch.full((5, 3, 32, 8), 7.0)
    for row, token in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1)):
        expected[spans[row, 3], :, spans[row, 0] + token] = states[row, :, token]
    assert torch.equal(cache.layers[0].keys, expected)
    expected[expected != 7.0] *= -1.0
    assert torch.equal(cache.layers[0].values, expected)
    spans[1, 3] = 5
    with pytest.raises(ValueError, match=r"spans: expected 0 <= cache row < 5, got 5 in row 1"):
        cache.update(states, states, 0)


def attention_inputs(num_heads: int, head_dim: int, total: int) -> tuple[torch.Tensor, ...]:
    """Queries of `num_heads` heads over 2 key heads, two rows."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, num_heads, total, head_dim, generator=generator)
    key, value = torch.randn(2, 2, 2, total, head_dim, generator=generator)
    return query, key, value


@pytest.mark.parametrize("head_dim", [5, 16, 24, 32, 64, 96])
@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("window", [None, 1, 20, 390])
def test_attention_does_not_depend_on_the_batch(head_dim, num_heads, window) -> None:
    """Against torch on whole rows; then in pieces, every one of which must have the same bits."""
    total = 400
    query, key, value = attention_inputs(num_heads, head_dim, total)

    def attend(first: int, count: int, width: int) -> torch.Tensor:
        firsts = torch.full((2,), first)
        return batch_invariant_attention(
            torch.nn.Identity(),
            query[:, :, first : first + count],
            key[:, :, :width],
            value[:, :, :width],
            span_mask(firsts, firsts + count - 1, torch.arange(2), window),
        )[0]

    whole = attend(0, total, total)
    behind = torch.arange(total)[:, None] - torch.arange(total)
    seen = (behind >= 0) & (behind < (window or total))
    mask = torch.zeros(total, total).masked_fill(~seen, -torch.inf)
    repeated = [tensor.repeat_interleave(num_heads // 2, 1) for tensor in (key, value)]
    plain = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask)
    torch.testing.assert_close(whole, plain.transpose(1, 2), atol=2e-6, rtol=1e-5)
    for first, count in ((0, 1), (5, 1), (5, 2), (5, 3), (399, 1), (90, 33), (370, 17), (10, 193)):
        for width in {first + count, total}:
            actual = attend(first, count, width)
            assert torch.equal(actual, whole[:, first : first + count]), (first, count, width)


def test_attention_of_rows_of_different_lengths() -> None:
    """Padding gives zeros and is not read: neither what lies behind a row's end nor NaN there
    matters."""
    query, key, value = attention_inputs(4, 32, 64)
    first, last = torch.tensor([3, 40]), torch.tensor([9, 40])
    rows = torch.arange(2)[:, None]
    columns = first[:, None] + torch.arange(8)
    queries = query.transpose(1, 2)[rows, columns].transpose(1, 2)
    mask = span_mask(first, last, torch.arange(2), None)
    for tensor in (key, value):
        tensor[0, :, 10:] = torch.nan
        tensor[1, :, 41:] = torch.nan
    out = batch_invariant_attention(None, queries, key, value, mask)[0]
    assert torch.equal(out[0, 7:], torch.zeros(1, 4, 32))
    assert torch.equal(out[1, 1:], torch.zeros(7, 4, 32))
    for row, count in ((0, 7), (1, 1)):
        alone = batch_invariant_attention(
            None,
            queries[row : row + 1, :, :count],
            key[row : row + 1],
            value[row : row + 1],
            span_mask(first[row : row + 1], last[row : row + 1], torch.tensor([0]), None),
        )[0]
        assert alone.isfinite().all()
        assert torch.equal(out[row, :count], alone[0])


def test_neighbours_of_one_cache_row_are_computed_together() -> None:
    """Tokens given one by one, as rows that share a cache row, have the bits of one row of them
    all."""
    query, key, value = attention_inputs(4, 32, 64)
    rows = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1])
    positions = torch.tensor([8, 9, 10, 11, 12, 13, 40, 50])
    queries = query[rows, :, positions].unsqueeze(2)
    mask = span_mask(positions, positions, rows, None)
    out = batch_invariant_attention(None, queries, key, value, mask)[0][:, 0]
    zeros = torch.zeros(2, dtype=torch.int64)
    whole_mask = span_mask(zeros, zeros + 63, torch.arange(2), None)
    whole = batch_invariant_attention(None, query, key, value, whole_mask)[0]
    assert torch.equal(out, whole[rows, positions])


@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        (-1, 0, "spans: expected 0 <= first <= last < 16, got -1 and 0 in row 1"),
        (4, 3, "spans: expected 0 <= first <= last < 16, got 4 and 3 in row 1"),
        (15, 16, "spans: expected 0 <= first <= last < 16, got 15 and 16 in row 1"),
        (2, 5, "spans: expected at most 3 tokens, got 4 in row 1"),
    ],
)
def test_attention_refuses_spans_outside_the_cache(first: int, last: int, message: str) -> None:
    query, key, value = attention_inputs(2, 8, 16)
    mask = span_mask(torch.tensor([0, first]), torch.tensor([0, last]), torch.arange(2), None)
    with pytest.raises(ValueError, match=message):
        batch_invariant_attention(None, query[:, :, :3], key, value, mask)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "qwen3_sliding"])
def test_batch_invariance(name: str) -> None:
    assert TransformersEngine(build(name)).batch_invariance_error() == 0.0


def test_batch_invariance_error_sees_a_difference() -> None:
    """Rounding of the same model without the rules on shapes."""
    error = TransformersEngine(build("llama"), batch_invariant=False).batch_invariance_error()
    assert 0.0 < error < 1e-4


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_caches_are_gone_when_nobody_has_them(batch_invariant: bool, monkeypatch) -> None:
    """Reference counts have to do: the collector of cycles does not know what a GPU's memory is."""
    made: list[weakref.ref[SlotCache]] = []
    new_cache = ModelForward.new_cache

    def noted(*args: object) -> SlotCache:
        cache = new_cache(*args)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(ModelForward, "new_cache", noted)
    engine = TransformersEngine(build("llama"), num_slots=4, batch_invariant=batch_invariant)
    gc.collect()
    made.clear()
    gc.disable()
    try:
        for longest in (4, 20):
            engine.rollout(random_requests(12, longest=longest), SAMPLING, Coupled())
        left = [cache() for cache in made if cache() is not None]
    finally:
        gc.enable()
    assert len(made) == 4
    # Those that a CPU keeps are the last call's, which had no room in the first one's.
    assert len(left) == (2 if batch_invariant else 0)
