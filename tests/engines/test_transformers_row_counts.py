"""Few rows are filled up to a number of rows whose matrix products have the bits of many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_models import SAMPLING, VOCAB, build, random_requests
from transformers.pytorch_utils import Conv1D

from spec_rollout.acceptance import Coupled
from spec_rollout.engines.transformers import TransformersEngine
from spec_rollout.engines.transformers.forward import ModelForward
from spec_rollout.engines.transformers.row_counts import MIN_ROWS, row_counts


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Linear(32, 64),
        torch.nn.Linear(64, 32, bias=False),
        torch.nn.Linear(576, 192, bias=False),  # of SmolLM2-135M
        torch.nn.Linear(100, 1000),
        torch.nn.Linear(2048, 8, bias=False),  # an adapter's
        Conv1D(96, 32),  # GPT-2's
    ],
    ids=str,
)
def test_products_of_these_counts_have_the_bits_of_many(
    module: torch.nn.Module, threads: int
) -> None:
    counts = row_counts(module)
    assert counts[-1] == MIN_ROWS
    assert list(counts) == sorted(set(counts))
    generator = torch.Generator().manual_seed(threads)
    width = module.weight.shape[1 if isinstance(module, torch.nn.Linear) else 0]
    rows = torch.randn(200, 1, width, generator=generator)
    with torch.inference_mode():
        many = module(rows)
        for count in counts:
            for start in range(0, 200 - count, 13):
                assert torch.equal(module(rows[start : start + count]), many[start : start + count])


def test_weights_that_other_code_multiplies_are_left_at_many_rows() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.Parameter(torch.zeros(2, 4, 4))

    assert row_counts(torch.nn.Sequential(torch.nn.Linear(4, 4), Experts())) == (MIN_ROWS,)


class Int8Linear(torch.nn.Linear):
    """Weights of eight bits and one scale, multiplied as whole numbers of the input's dtype."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax() / 127)
        whole = (weight / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(whole, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class PackedLinear(torch.nn.Module):
    """Weights in a buffer, as GPTQ and AWQ have them."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        inner = Int8Linear(linear)
        self.register_buffer("qweight", inner.weight.detach().to(torch.int32))
        self.register_buffer("scale", inner.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale)


QUANTISED = [Int8Linear, PackedLinear]


@pytest.mark.parametrize("quantised", QUANTISED)
def test_quantised_weights_are_products_not_known(quantised) -> None:
    def counts(dtype: torch.dtype) -> tuple[int, ...]:
        first, last = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
        return row_counts(torch.nn.Sequential(quantised(first), last.to(dtype)))

    assert counts(torch.float32) == (MIN_ROWS,)
    assert counts(torch.bfloat16) == ()


def test_masks_positions_and_tables_are_no_weights() -> None:
    linear = torch.nn.Linear(64, 32)
    expected = row_counts(linear)
    linear.part = torch.nn.Module()
    linear.part.register_buffer("bias", torch.ones(1, 1, 8, 8, dtype=torch.bool))
    linear.part.register_buffer("position_ids", torch.arange(8)[None])
    linear.part.register_buffer("table", torch.zeros(8, 4))
    assert row_counts(linear) == expected


@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_quantised_layers_rolls_out(quantised, dtype: torch.dtype) -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = quantised(layer.mlp.down_proj)
    model = model.to(dtype)
    engine = TransformersEngine(model)
    assert engine.batch_invariant == (dtype == torch.float32)
    engine.rollout(random_requests(5), SAMPLING, Coupled())


def test_one_row_is_filled_up_to_the_least_that_will_do() -> None:
    model = build("llama")
    least = row_counts(model)[0]
    for invariant, computed in ((True, least), (False, 1)):
        forward = ModelForward(model, invariant)
        with forward.session():
            cache = forward.new_cache(1, 16)
            token = torch.tensor([3])
            logits = forward(cache, token, torch.tensor([0]), None, 1)
        assert logits.shape == (1, VOCAB)
        assert forward.num_padding_tokens == computed - 1


@pytest.mark.slow
def test_a_rollout_alone_is_what_it_is_among_others(threads: int) -> None:
    """In every bit: the last of a batch to finish decodes alone."""
    engine = TransformersEngine(build("qwen3"))
    requests = random_requests(20)
    together = engine.rollout(requests, SAMPLING, Coupled())
    assert engine._forward._counted_for == threads
    cu = together.cu_response_lens.tolist()
    for row in (0, 7, 19):
        alone = engine.rollout(_only(requests, row), SAMPLING, Coupled())
        expected = slice(cu[row], cu[row + 1])
        assert torch.equal(alone.response_ids, together.response_ids[expected])
        assert torch.equal(alone.logprobs, together.logprobs[expected])
    assert engine.batch_invariance_error() == 0.0


def _only(requests, row: int):
    from spec_rollout.types import Drafts, RolloutRequests

    start, end = requests.cu_prompt_lens[row : row + 2].tolist()
    return RolloutRequests(
        prompt_ids=requests.prompt_ids[start:end],
        cu_prompt_lens=torch.tensor([0, end - start]),
        keys=requests.keys[row : row + 1],
        drafts=Drafts.none(1),
    )


def test_another_number_of_threads_is_tried_anew() -> None:
    forward = ModelForward(build("llama"), True)
    before = torch.get_num_threads()
    assert forward._counted_for == before
    try:
        torch.set_num_threads(before + 1)
        with forward.session():
            assert forward._counted_for == before + 1
    finally:
        torch.set_num_threads(before)
