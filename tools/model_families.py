"""Tries model families of transformers: tiny random models of each, in the engines and the trainer.

    python tools/model_families.py                    # embedded engine and trainer, in .venv
    .venv-vllm/bin/python tools/model_families.py --vllm --only llama    # the vLLM engine

The vLLM column has not been filled yet. It takes a process for each family, because an engine that
is closed leaves the next one of its process without process groups.

Each model rolls out five prompts of 1 to 50 tokens together, past its windows. Every log-prob is
compared with that of a plain forward of the row alone; so are those of the trainer's padded
forward. What is refused is noted in the error's words, in benchmarks/results/model_families.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _common import RESULTS_DIR, write_json

from spec_rollout.runs.environment import environment

VOCAB = 96
PROMPTS = ([5, 6, 7], [9] * 20, list(range(10, 60)), [3], [11, 12] * 9)
MAX_TOKENS = 24
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
}
_SMALL_HEADS = {"head_dim": 16}
# Families, with what their configs want beside `_SHAPE`.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bamba": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8},
    "cohere": {},
    "cohere2": {},
    "cwm": {},
    "deepseek_v2": {**_EXPERTS, **_MLA},
    "deepseek_v3": {**_EXPERTS, **_MLA},
    "diffllama": {},
    "doge": {},
    "dots1": {**_EXPERTS, "num_key_value_heads": 4, "n_shared_experts": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {**_EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": {},
    "falcon": {},
    "falcon, alibi": {"model_type": "falcon", "alibi": True},
    "falcon_h1": {},
    "falcon_mamba": {},
    "flex_olmo": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_EXPERTS},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gpt_neox": {},
    "gpt_oss": {**_EXPERTS, **_SMALL_HEADS},
    "gptj": {"rotary_dim": 8},
    "granite": {},
    "granitemoe": {},
    "granitemoehybrid": {},
    "granitemoeshared": {},
    "helium": _SMALL_HEADS,
    "hunyuan_v1_dense": _SMALL_HEADS,
    "jais2": {},
    "jamba": {},
    "jetmoe": {},
    "lfm2": {},
    "llama": {},
    "llama, dynamic rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama, llama3 rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama, yarn": {
        "model_type": "llama",
        "max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama4_text": {},
    "mamba": {},
    "minicpm3": {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32},
    "minimax": {},
    "ministral": _SMALL_HEADS,
    "mistral": {},
    "mixtral": {},
    "modernbert-decoder": {},
    "moshi": {},
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "opt": {},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phi3, longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 96,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
            "original_max_position_embeddings": 96,
        },
    },
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": _SMALL_HEADS,
    "qwen3_moe": {**_EXPERTS, **_SMALL_HEADS},
    "qwen3_next": {**_EXPERTS, **_SMALL_HEADS, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": {},
    "rwkv": {},
    "seed_oss": _SMALL_HEADS,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {},
    "xlstm": {},
}
_LARGEST = 8_000_000  # parameters


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one family in one place.

    Attributes:
        gap: Largest difference of a log-prob, nats; None if it was refused.
        refused: Why, in the error's words.
    """

    gap: float | None = None
    refused: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"gap": self.gap, "refused": self.refused}


def build(name: str) -> Any:
    """A tiny random model of a family, in evaluation mode.

    Raises:
        ValueError: if transformers here has no such family, or makes it too large.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_SHAPE, **FAMILIES[name]}
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    size = sum(parameter.numel() for parameter in empty.parameters())
    if size > _LARGEST:
        raise ValueError(f"a tiny one has {size:,} parameters")
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.float().eval()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:240]}"


def _rows(rollouts: Any) -> list[tuple[list[int], list[int]]]:
    ids = rollouts.response_ids.tolist()
    cu = rollouts.cu_response_lens.tolist()
    return [(p, ids[a:b]) for p, a, b in zip(PROMPTS, cu, cu[1:], strict=False)]


def _plain(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]


def _gap(model: Any, rollouts: Any) -> float:
    expected = torch.cat([_plain(model, *row) for row in _rows(rollouts)])
    return float((rollouts.logprobs.double() - expected).abs().max())


def _roll_out(engine: Any) -> Any:
    from spec_rollout import Coupled, RolloutSession, SamplingParams

    session = RolloutSession(engine, Coupled(), seed=0)
    return session.rollout(PROMPTS, 1, SamplingParams(max_tokens=MAX_TOKENS), step=0, epoch=0)


def try_embedded(model: Any) -> Outcome:
    """The embedded engine."""
    from spec_rollout import TransformersEngine

    try:
        engine = TransformersEngine(model, num_slots=4, max_verify_tokens=64, verify_chunk=8)
        return Outcome(gap=_gap(model, _roll_out(engine)))
    except Exception as error:
        return Outcome(refused=_one_line(error))


def try_trainer(model: Any) -> Outcome:
    """The trainer's padded forward."""
    from spec_rollout.train.forward import check_padded_rows, padded_gap

    try:
        check_padded_rows(model, 96)
        return Outcome(gap=padded_gap(model, 96).largest)
    except Exception as error:
        return Outcome(refused=_one_line(error))


def try_vllm(model: Any) -> Outcome:
    """The vLLM engine, in this process."""
    from spec_rollout import VLLMEngine

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            engine = VLLMEngine(
                folder,
                llm_args={
                    "dtype": "float32",
                    "max_model_len": 96,
                    "max_num_seqs": 8,
                    "enforce_eager": True,
                    "kv_cache_memory_bytes": 64 << 20,
                },
            )
        except Exception as error:
            return Outcome(refused=_one_line(error))
        try:
            return Outcome(gap=_gap(model, _roll_out(engine)))
        except Exception as error:
            return Outcome(refused=_one_line(error))
        finally:
            engine.close()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--vllm", action="store_true", help="the vLLM engine instead")
    options.add_argument("--only", nargs="+", choices=list(FAMILIES), metavar="FAMILY")
    options.add_argument("--out", type=Path, default=RESULTS_DIR)
    args = options.parse_args()
    if args.vllm and len(args.only or ()) != 1:
        options.error("--vllm: expected --only with one family")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    path = args.out / "model_families.json"
    rows: dict[str, dict[str, Any]] = {}
    content: dict[str, Any] = {}
    if path.is_file():
        content = json.loads(path.read_text())
        rows = {row["family"]: row for row in content["rows"]}
    for name in args.only or FAMILIES:
        row = rows.setdefault(name, {"family": name})
        try:
            model = build(name)
        except Exception as error:
            print(f"{name}: not built: {_one_line(error)}", flush=True)
            if not args.vllm:
                row["not_built"] = _one_line(error)
            continue
        row.pop("not_built", None)
        row["architecture"] = type(model).__name__
        if args.vllm:
            row["vllm"] = try_vllm(model).as_dict()
        else:
            row["embedded"] = try_embedded(model).as_dict()
            row["trainer"] = try_trainer(model).as_dict()
        print(f"{name}: " + json.dumps({k: row[k] for k in row if k != "family"}), flush=True)
    here = environment()
    places = content.get("environment", {}).get("places", {})
    places["vllm" if args.vllm else "embedded"] = here["packages"]
    # The vLLM column is of another environment; the file's own is that of the others.
    main_environment = content["environment"] if args.vllm and content else here
    write_json(
        path,
        {
            "name": "model_families",
            "command": "python tools/model_families.py",
            "date": here["date"],
            "environment": {**main_environment, "places": places},
            "rows": [rows[name] for name in FAMILIES if name in rows],
        },
    )
    return 0


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    sys.exit(main())
