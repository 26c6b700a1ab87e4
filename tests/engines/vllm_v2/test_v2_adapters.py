"""Requests with adapters, of the output head too, beside requests without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from v2_samples import (
    VOCAB,
    Given,
    assert_same,
    drafted,
    generate,
    metrics_of,
    mixed_drafts,
    params,
    random_prompts,
)

RANK = 8
ARGS: dict[str, Any] = {
    "enable_lora": True,
    # One more than there are adapters: vLLM's operators for CPUs take the last place for the
    # requests that have none.
    "max_loras": 3,
    "max_lora_rank": RANK,
}
# Of the tiny model: inner and outer size.
ATTENTION = {
    "self_attn.q_proj": (64, 64),
    "self_attn.v_proj": (64, 32),
    "mlp.down_proj": (128, 64),
}
HEAD = {"lm_head": (64, VOCAB)}
PROMPT = random_prompts([19], seed=3)[0]


def write_adapter(folder: Path, modules: dict[str, tuple[int, int]], seed: int) -> None:
    """A random adapter in peft's format."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inner, outer) in modules.items():
        layers = [""] if name == "lm_head" else [f"model.layers.{i}." for i in range(2)]
        for layer in layers:
            stem = f"base_model.model.{layer}{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator) * 0.2
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outer, RANK, generator=generator) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(name.split(".")[-1] for name in modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def adapters(v2_here: None, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """None, one of the layers, one of the layers and the output head."""
    from vllm.lora.request import LoRARequest

    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "layers", ATTENTION, 1)
    write_adapter(folder / "head", {**ATTENTION, **HEAD}, 2)
    return [
        None,
        *(LoRARequest(n, i, str(folder / n)) for i, n in enumerate(("layers", "head"), 1)),
    ]


# Each prompt with each adapter; neighbours in the batch have different ones.
def requests(adapters: list[Any]) -> tuple[list[list[int]], list[Any], list[Any]]:
    prompts = [PROMPT] * 3 + random_prompts([5, 30, 11, 7], seed=4)
    sampling = [params(40)] * 3 + [params(50 + i) for i in range(4)]
    return prompts, sampling, [adapters[i % 3] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def plain(make_llm: Callable[..., Any], adapters: list[Any]) -> Given:
    prompts, sampling, loras = requests(adapters)
    given = generate(make_llm(**ARGS), prompts, sampling, lora_request=loras)
    assert len({tuple(row) for row in given.tokens[:3]}) == 3  # each adapter says something else
    return given


def test_stocks_own_rows_have_their_adapters(
    make_llm: Callable[..., Any], adapters: list[Any], plain: Given
) -> None:
    """What the others are held to: alone in the batch a request gives what it gives beside them."""
    prompts, sampling, loras = requests(adapters)
    llm = make_llm(**ARGS)
    for i in range(3):
        alone = generate(llm, prompts[i : i + 1], sampling[i : i + 1], lora_request=loras[i])
        assert alone.tokens[0] == plain.tokens[i]


@pytest.mark.parametrize(
    "is_async", [False, pytest.param(True, marks=pytest.mark.v2_large)], ids=["sync", "async"]
)
def test_two_adapters_and_none(
    make_llm: Callable[..., Any], adapters: list[Any], plain: Given, is_async: bool
) -> None:
    prompts, sampling, loras = requests(adapters)
    llm = make_llm(8, async_scheduling=is_async, **ARGS)
    for drafts in (mixed_drafts(plain.tokens), plain.tokens):
        metrics_of(llm)
        given = list(map(drafted, sampling, drafts))
        assert_same(generate(llm, prompts, given, lora_request=loras), plain)
    assert metrics_of(llm).num_fully_reused == len(prompts)
