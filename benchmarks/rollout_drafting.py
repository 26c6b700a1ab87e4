"""The second table of bench_rollout.py: prefix reuse, history drafting and both, on real text of a
drifting policy.

The policies are the demo's: its plain run is trained for two epochs (four optimiser steps), and
rollouts of the weights at the start of the second epoch are the history of rollouts of the weights
at its end, as they would be in the third. Responses are long-tailed in length, for they end where
the model ends them. The new rollouts are made under the same noise where reuse is lossless
(`Coupled`), under fresh noise with `Lenient(0.5)`.

| mode | drafts | history |
|---|---|---|
| vanilla | | |
| prefix | own old rollout | |
| drafting | | old rollouts of the group, and its live ones |
| both | own old rollout | old rollouts of the group, and its live ones |
| useless | | random tokens, every request a group of its own; on an engine that sees nothing else |
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Results, Timing

from spec_rollout.acceptance import AcceptanceRule, Coupled, Lenient, NoReuse
from spec_rollout.demo import model_dir
from spec_rollout.demo.task import MAX_RESPONSE_TOKENS, training_problems
from spec_rollout.engines.vllm import VLLMEngine
from spec_rollout.keys import noise_keys, prompt_key
from spec_rollout.packed import cu_lens_from
from spec_rollout.types import (
    Drafts,
    FinishReason,
    History,
    RolloutRequests,
    Rollouts,
    SamplingParams,
)

GROUP = 8
RULES: dict[str, AcceptanceRule] = {"lossless": Coupled(), "log_lenience 0.5": Lenient(0.5)}


def _requests(batch: int) -> tuple[RolloutRequests, RolloutRequests, tuple[int, ...]]:
    """One batch with the noise of two epochs, and the stop tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    prompts = [tokenizer(p.prompt)["input_ids"] for p in training_problems(-(-batch // GROUP))]
    rows = [prompts[r // GROUP] for r in range(batch)]
    keys = [prompt_key(row) for row in rows]
    first, second = (
        RolloutRequests(
            torch.tensor([token for row in rows for token in row], dtype=torch.int32),
            cu_lens_from(torch.tensor([len(row) for row in rows])),
            noise_keys(0, epoch, keys, np.arange(batch) % GROUP),
            Drafts.none(batch),
        )
        for epoch in (0, 1)
    )
    return first, second, (tokenizer.eos_token_id,)


def _useless(old: Rollouts, vocab: int) -> History:
    """As many random tokens for every request; no request sees another."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, vocab, old.response_ids.numel()).astype(np.int32)
    groups = torch.arange(old.batch)
    return History(torch.from_numpy(ids), old.cu_response_lens, groups, groups)


def _policies(quick: bool) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The demo's weights one epoch of training apart."""
    from safetensors.torch import load_file

    from spec_rollout.config.sections import CheckpointConfig
    from spec_rollout.demo.preset import FULL, FULL_RUNS, SHORT, demo_grid, prepare
    from spec_rollout.train.trainer import run as train

    size = replace(SHORT if quick else FULL, epochs=2)
    per_epoch = size.num_prompts // size.prompts_per_step
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        prepare(out, ["vanilla"], size)
        runs = {"vanilla": FULL_RUNS["vanilla"]}
        config = demo_grid(runs, out, size, seed=0).configs()["vanilla"]
        checkpoint = CheckpointConfig(every_steps=per_epoch, keep_last=2)
        train(
            replace(
                config,
                eval=replace(config.eval, at_start=False, at_end=False),
                checkpoint=checkpoint,
            ),
        )
        old, new = sorted((out / "vanilla" / "checkpoints").glob("*/model/model.safetensors"))
        return load_file(old), load_file(new)


def run(args: argparse.Namespace, results: Results) -> None:
    """Measures every batch size and adds the rows."""
    on_gpu = torch.cuda.is_available()
    engine_args: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": not on_gpu or args.eager,
        "max_model_len": 64 + MAX_RESPONSE_TOKENS,
        "max_num_seqs": max(args.batches),
        "max_num_batched_tokens": 8192,
        "seed": 0,
        **({"gpu_memory_utilization": 0.4} if on_gpu else {"block_size": 32}),
    }
    policies = _policies(args.quick)
    for batch in args.batches:
        engines = [
            VLLMEngine(str(model_dir()), num_speculative_tokens=args.k, llm_args=dict(engine_args))
            for _ in range(2)
        ]
        _run_batch(args, results, *engines, policies, batch)
        del engines


def _run_batch(
    args: argparse.Namespace,
    results: Results,
    engine: VLLMEngine,
    without_use: VLLMEngine,
    policies: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    batch: int,
) -> None:
    """`without_use` serves the useless history: an engine carries what it learns about proposals
    from call to call."""
    first, second, stops = _requests(batch)
    sampling = SamplingParams(
        max_tokens=args.max_tokens or MAX_RESPONSE_TOKENS, stop_token_ids=stops
    )
    engine.update_weights(policies[0].items())
    old = engine.rollout(first, sampling, NoReuse())
    drafts = Drafts(
        old.response_ids,
        old.cu_response_lens,
        old.logprobs,
        old.finish_reasons == FinishReason.STOP,
    )
    groups = torch.arange(batch) // GROUP
    history = History(old.response_ids, old.cu_response_lens, groups, groups, old.logprobs)
    for each in (engine, without_use):
        each.update_weights(policies[1].items())

    contenders: dict[tuple[str, str], tuple[RolloutRequests, AcceptanceRule]] = {}
    for label, rule in RULES.items():
        base = second if rule.fresh_noise else first
        contenders["vanilla", label] = (base, NoReuse())
        contenders["prefix", label] = (replace(base, drafts=drafts), rule)
        contenders["drafting", label] = (replace(base, history=history), NoReuse())
        contenders["both", label] = (replace(base, drafts=drafts, history=history), rule)
    useless = replace(first, history=_useless(old, engine.vocab_size))
    contenders["useless", "lossless"] = (useless, NoReuse())

    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    last: dict[tuple[str, str], Rollouts] = {}
    items = list(contenders.items())
    for round_ in range(args.repeats + 1):
        print("warm-up" if round_ == 0 else f"round {round_} of {args.repeats}", flush=True)
        shift = round_ * len(items) // (args.repeats + 1)
        for key, (requests, rule) in items[shift:] + items[:shift]:
            serving = without_use if key[0] == "useless" else engine
            serving.llm.reset_prefix_cache()
            start = time.perf_counter()
            last[key] = serving.rollout(requests, sampling, rule)
            if round_:
                seconds[key].append(time.perf_counter() - start)

    def timing(key: tuple[str, str]) -> Timing:
        p20, p50, p80 = np.percentile(seconds[key], [20, 50, 80]).tolist()
        return Timing(p20, p50, p80, len(seconds[key]))

    for mode, label in contenders:
        rollouts, vanilla = last[mode, label], ("vanilla", label)
        stats = rollouts.stats
        expected = last["prefix" if mode == "both" else "vanilla", label]
        same = torch.equal(rollouts.response_ids, expected.response_ids)
        if mode in ("drafting", "both", "useless") or label == "lossless":
            assert same, (mode, label)  # proposals never change a token
        results.add(
            f"{mode}, {label}, {batch}",
            timing=timing((mode, label)),
            shape={"batch": batch, "response_tokens": stats.num_response_tokens},
            dtype="float32",
            peers={} if mode == "vanilla" else {"vanilla": timing(vanilla)},
            mode=mode,
            rule=label,
            longest_response=int(rollouts.response_lens.max()),
            reused_share=round(stats.reused_fraction, 4),
            engine_steps=stats.num_engine_steps,
            max_row_steps=stats.max_row_steps,
            tail_steps=stats.num_tail_steps,
            tail_seconds=round(stats.tail_seconds, 4),
            tokens_per_step=round(stats.tokens_per_step, 3),
            proposed_tokens=stats.num_proposed_tokens,
            accepted_proposals=stats.num_accepted_proposals,
            computed_tokens=stats.num_computed_tokens,
        )
