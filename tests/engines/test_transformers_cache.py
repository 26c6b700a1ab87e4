"""KV storage, attention and forwards of the embedded engine, below the engine itself."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, build

from spec_rollout.engines import TransformersEngine
from spec_rollout.engines.transformers.attention import batch_invariant_attention
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.slot_cache import SlotCache, copy_rows

LENS = [7, 30, 1, 19, 12]


def feed(
    forward: ModelForward, cache: SlotCache, rows: list[list[int]], starts: list[int]
) -> torch.Tensor:
    """Logits of every row's last token."""
    lens = [len(row) for row in rows]
    tokens = torch.zeros(len(rows), max(lens), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    first, count = torch.tensor(starts), torch.tensor(lens)
    last = torch.arange(len(rows)) * max(lens) + count - 1
    end = int((first + count).max())
    return forward(cache, tokens, first, first + count - 1, end, last)


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
    cache = SlotCache(forward.num_layers, 16, 64)
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
    lanes = SlotCache(forward.num_layers, 5, 64)
    slots = SlotCache(forward.num_layers, 9, 48)
    kept = [4, 30, 1, 10, 0]  # some rows are cut
    with forward.session():
        feed(forward, lanes, [row[:-1] for row in rows], [0] * 5)
        copy_rows(lanes, slots, [0, 1, 2, 3], [6, 0, 3, 8], kept[:4])
        slots.move_rows([6, 8], [1, 2], [4, 10])
        order = [1, 0, 3, 2]
        fed = [rows[row][kept[row] : kept[row] + 1] for row in order]
        actual = feed(forward, slots, fed, [kept[row] for row in order])
        for row, logits in zip(order, actual, strict=True):
            fresh = SlotCache(forward.num_layers, 16, 48)
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


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 96])
@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("window", [None, 20, 390])
def test_attention_does_not_depend_on_the_batch(head_dim, num_heads, window) -> None:
    """Widths across the border of key blocks, query counts across those of query blocks."""
    generator = torch.Generator().manual_seed(0)
    total = 800
    query = torch.randn(2, num_heads, total, head_dim, generator=generator)
    key, value = torch.randn(2, 2, 2, total, head_dim, generator=generator)
    behind = torch.arange(total)[:, None] - torch.arange(total)
    seen = (behind >= 0) & (behind < (window or total))
    mask = torch.zeros(total, total).masked_fill(~seen, -torch.inf)

    def attend(first: int, count: int, width: int) -> torch.Tensor:
        queries = slice(first, first + count)
        return batch_invariant_attention(
            torch.nn.Identity(),
            query[:, :, queries],
            key[:, :, :width],
            value[:, :, :width],
            mask[None, None, queries, :width].expand(2, 1, -1, -1),
        )[0]

    whole = attend(0, total, total)
    repeated = [tensor.repeat_interleave(num_heads // 2, 1) for tensor in (key, value)]
    plain = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask)
    torch.testing.assert_close(whole, plain.transpose(1, 2), atol=2e-6, rtol=1e-5)
    for first, count in (
        (0, 1),
        (5, 1),
        (383, 1),
        (384, 1),
        (700, 1),
        (90, 33),
        (370, 40),
        (10, 193),
    ):
        for width in {-(-(first + count) // 16) * 16, total}:
            actual = attend(first, count, width)
            assert torch.equal(actual, whole[:, first : first + count]), (first, count, width)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "qwen3_sliding"])
def test_batch_invariance(name: str) -> None:
    assert TransformersEngine(build(name)).batch_invariance_error() == 0.0


def test_batch_invariance_error_sees_a_difference() -> None:
    """Rounding of the same model without the rules on shapes."""
    error = TransformersEngine(build("llama"), batch_invariant=False).batch_invariance_error()
    assert 0.0 < error < 1e-4
