"""Tries model families of transformers: tiny random models of each, in the engines and the trainer.

    python tools/model_families.py                          # embedded engine and trainer, in .venv
    nice .venv-vllm/bin/python tools/model_families.py --vllm    # the vLLM engine, ten minutes

Each model rolls out five prompts of 1 to 50 tokens together, past its windows. Every log-prob is
compared with that of a plain forward of the row alone; so are those of the trainer's padded
forward. The vLLM engine is then given other weights by `update_weights`, and compared again. It
takes a process for each family: vLLM makes its process groups once. What is refused is noted in the
error's words, in benchmarks/results/model_families.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
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
# vLLM's kernels for CPUs want heads of 32 and wider experts.
_VLLM_SHAPE = {"hidden_size": 128}
_VLLM_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
_VLLM_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    name: {
        **({"head_dim": 32} if "head_dim" in settings else {}),
        **({"moe_intermediate_size": 64} if "moe_intermediate_size" in settings else {}),
    }
    for name, settings in FAMILIES.items()
} | {
    "codegen": {"rotary_dim": 16},
    "deepseek_v2": {"moe_intermediate_size": 64, **_VLLM_MLA},
    "deepseek_v3": {"moe_intermediate_size": 64, **_VLLM_MLA, "topk_method": "noaux_tc"},
    "gptj": {"rotary_dim": 16},
    "phi3, longrope": {
        "rope_parameters": {
            **FAMILIES["phi3, longrope"]["rope_parameters"],
            "short_factor": [1.0] * 16,
            "long_factor": [3.0] * 16,
        }
    },
}
_SMALL = 1e-3  # nats, of a gap that needs no explanation
_VLLM_SECONDS = 180  # for one family
_LARGEST = 8_000_000  # parameters


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one family in one place.

    Attributes:
        gap: Largest difference of a log-prob, nats; None if it was refused.
        refused: Why, in the error's words.
        alone: The difference of vLLM without this package, where `gap` is not small.
        updated: The difference after an update of the weights; None where it was not tried.
        alone_updated: As `alone`, of a vLLM that has loaded these weights.
        update_refused: Why the weights could not be updated.
    """

    gap: float | None = None
    refused: str | None = None
    alone: float | None = None
    updated: float | None = None
    alone_updated: float | None = None
    update_refused: str | None = None

    def as_dict(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"gap": self.gap, "refused": self.refused}
        if self.alone is not None:
            shown["alone"] = self.alone
        if self.updated is not None or self.update_refused is not None:
            shown |= {"updated": self.updated, "update_refused": self.update_refused}
        if self.alone_updated is not None:
            shown["alone_updated"] = self.alone_updated
        return shown


def build(name: str, *, for_vllm: bool = False) -> Any:
    """A tiny random model of a family, in evaluation mode.

    Raises:
        ValueError: if transformers here has no such family, or makes it too large.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_SHAPE, **FAMILIES[name]}
    if for_vllm:
        settings |= {**_VLLM_SHAPE, **_VLLM_FAMILIES[name]}
    kind = settings.pop("model_type", name)
    if not hasattr(AutoConfig.for_model(kind), "sliding_window"):
        del settings["sliding_window"]  # vLLM goes by it where transformers does not
    config = AutoConfig.for_model(kind, **settings)
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


def _one_line(error: BaseException, folder: str | None = None) -> str:
    """An error as the table has it; `folder` is a path of this run that it may name."""
    text = " ".join(str(error).split()).partition(" Supported architectures:")[0]
    if folder is not None:
        text = text.replace(folder, "MODEL")
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


_VLLM_ARGS: Mapping[str, Any] = {
    "dtype": "float32",
    "max_model_len": 96,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
}


def try_vllm(model: Any) -> Outcome:
    """The vLLM engine, in this process; the model is given other weights on the way."""
    from spec_rollout import VLLMEngine

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            engine = VLLMEngine(folder, llm_args=_VLLM_ARGS)
            gap = _gap(model, _roll_out(engine))
        except Exception as error:
            refused = _one_line(error, folder)
            # Refused by this package, or plainly by vLLM; for the rest it is found out whose it is.
            if not refused.startswith("model: ") and "are not supported" not in refused:
                alone = _vllm_alone(model, folder).refused
                refused = refused if alone is None else f"vLLM alone: {alone}"
            return Outcome(refused=refused)
        alone_gap = None if gap < _SMALL else _vllm_alone(model, folder).gap
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        try:
            engine.update_weights(model.named_parameters())
            updated = _gap(model, _roll_out(engine))
        except Exception as error:
            return Outcome(gap=gap, alone=alone_gap, update_refused=_one_line(error, folder))
        alone_updated = None
        if updated >= _SMALL:
            model.save_pretrained(folder)
            alone_updated = _vllm_alone(model, folder).gap
        return Outcome(gap=gap, alone=alone_gap, updated=updated, alone_updated=alone_updated)


_alive: list[Any] = []


def _vllm_alone(model: Any, folder: str) -> Outcome:
    """vLLM without this package."""
    from vllm import LLM, SamplingParams

    try:
        llm = LLM(folder, seed=0, **_VLLM_ARGS)
        _alive.append(llm)  # one that is collected takes the other's process groups with it
        params = SamplingParams(
            max_tokens=MAX_TOKENS, logprobs=0, seed=1, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
        outputs = [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]
        gaps = []
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            ids = list(output.token_ids)
            logprobs = [at[i].logprob for at, i in zip(output.logprobs, ids, strict=True)]
            expected = _plain(model, list(prompt), ids)
            gaps.append(float((torch.tensor(logprobs).double() - expected).abs().max()))
        return Outcome(gap=max(gaps))
    except Exception as error:
        return Outcome(refused=_one_line(error, folder))


def try_vllm_apart(name: str) -> dict[str, Any]:
    """`try_vllm` in a process of its own, forked from this one, which has loaded vLLM."""
    import vllm.v1.worker.cpu_worker  # noqa: F401 - loaded once, for all

    processes = multiprocessing.get_context("fork")
    here, there = processes.Pipe(duplex=False)
    process = processes.Process(target=_vllm_row, args=(name, there))
    process.start()
    there.close()
    try:
        if here.poll(_VLLM_SECONDS):
            return here.recv()
        return Outcome(refused=f"no answer in {_VLLM_SECONDS} seconds").as_dict()
    except EOFError:
        return Outcome(refused="the process ended without an answer").as_dict()
    finally:
        process.kill()
        process.join()


def _vllm_row(name: str, answer: Any) -> None:
    """Sends what comes of one family, and ends the process, past what vLLM's end prints."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        outcome = try_vllm(build(name, for_vllm=True))
    except Exception as error:
        outcome = Outcome(refused=f"not built: {_one_line(error)}")
    answer.send(outcome.as_dict())
    os._exit(0)


def _try_here(row: dict[str, Any], name: str) -> None:
    """The embedded engine and the trainer."""
    try:
        model = build(name)
    except Exception as error:
        row["not_built"] = _one_line(error)
        return
    row.pop("not_built", None)
    row["architecture"] = type(model).__name__
    row["embedded"] = try_embedded(model).as_dict()
    row["trainer"] = try_trainer(model).as_dict()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--vllm", action="store_true", help="the vLLM engine instead")
    options.add_argument("--only", nargs="+", choices=list(FAMILIES), metavar="FAMILY")
    options.add_argument("--out", type=Path, default=RESULTS_DIR)
    args = options.parse_args()
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
        if args.vllm:
            row["vllm"] = try_vllm_apart(name)
        else:
            _try_here(row, name)
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
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # a minute of compiling for each family
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
