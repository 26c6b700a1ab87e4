"""`spec-rollout rollout`: one pass over a file of prompts, with the drafts of an earlier one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec_rollout.config import options
from spec_rollout.config.sections import (
    ConfigError,
    DataConfig,
    ModelConfig,
    RolloutConfig,
    VLLMConfig,
)

if TYPE_CHECKING:
    from spec_rollout.acceptance import AcceptanceRule
    from spec_rollout.loading.data import PromptRow
    from spec_rollout.loading.policy import Policy
    from spec_rollout.types import Rollouts

HELP = "one rollout pass over a file of prompts"
_PORTION_SLOTS = 16  # times the engine's slots: rollouts between two updates of the progress bar

# Keys of `RolloutConfig` that are options of this command, by group.
_REUSE = ("rule", "log_lenience", "scale", "min_target_prob", "reuse_prob")
_SAMPLING = ("num_samples", "max_tokens", "temperature", "top_k", "top_p")
_ENGINE = ("engine", "num_slots", "max_model_len")


def add_options(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face causal LM folder"
    )
    files.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl")
    options.add_options(files, DataConfig, "prompt_column")
    files.add_argument(
        "--raw-prompts",
        action="store_true",
        help="no chat template: text prompts go to the model as they are",
    )
    options.add_options(files, DataConfig, "system_prompt")
    files.add_argument(
        "--continue-final-message",
        action="store_true",
        help="where the last message of a prompt is the assistant's, responses continue it",
    )
    files.add_argument(
        "--out", type=Path, required=True, metavar="FILE.jsonl", help="one row per rollout"
    )
    files.add_argument(
        "--stats",
        type=Path,
        metavar="FILE.json",
        help="default: OUT with .stats.json, if OUT is a file",
    )
    files.add_argument("--cache-in", type=Path, metavar="FILE", help="rollouts of an earlier pass")
    files.add_argument(
        "--cache-out", type=Path, metavar="FILE", help="these rollouts, for the next pass"
    )
    reuse = parser.add_argument_group("reuse")
    options.add_options(reuse, RolloutConfig, *_REUSE)
    reuse.add_argument(
        "--pass",
        dest="pass_index",
        type=int,
        metavar="N",
        help="0-based number of this pass; default: the one after that of --cache-in, or 0. Rules "
        "other than coupled draw new noise each pass",
    )
    sampling = parser.add_argument_group("sampling")
    options.add_options(sampling, RolloutConfig, *_SAMPLING, defaults={"num_samples": 1})
    sampling.add_argument("--seed", type=int, default=0)
    engine = parser.add_argument_group("engine")
    options.add_options(engine, RolloutConfig, *_ENGINE)
    options.add_options(engine, ModelConfig, "dtype", "device", "attention")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: naming the option or file, before anything is written.
    """
    config = _config(args)
    from spec_rollout.cache import RolloutCache
    from spec_rollout.commands.prompt_options import with_options
    from spec_rollout.loading.data import load_prompts
    from spec_rollout.loading.engines import check_engine, make_engine, without_weights
    from spec_rollout.loading.policy import load_policy
    from spec_rollout.rollout import RolloutSession
    from spec_rollout.runs.outputs import check_outputs
    from spec_rollout.runs.progress import progress
    from spec_rollout.types import RolloutStats

    stats_path = args.stats or _default_stats(args.out)
    check_outputs(
        {"--out": args.out, "--stats": stats_path, "--cache-out": args.cache_out},
        inputs={"--prompts": args.prompts, "--cache-in": args.cache_in},
        updates=[("--cache-in", "--cache-out")],
    )
    cache = RolloutCache()
    rule = config.acceptance()
    cached_pass = None if args.cache_in is None else cache.load(args.cache_in)
    pass_index = _pass_index(args, cached_pass, rule)
    check_engine(config, args.attention)
    # vLLM puts its own copy of the weights where it computes.
    device = "cpu" if config.engine == "vllm" else args.device
    model_config = ModelConfig(
        args.model, dtype=args.dtype, device=device, attention=args.attention
    )
    policy = load_policy(model_config)
    try:
        data = load_prompts(
            args.prompts,
            policy.tokenizer,
            vocab_size=policy.vocab_size,
            prompt_column=args.prompt_column,
            answer_column=None,
            chat_template=False if args.raw_prompts else None,
            system_prompt=args.system_prompt,
            continue_final_message=args.continue_final_message,
        )
    except ValueError as error:
        raise type(error)(with_options(str(error), continues=True)) from None
    for note in (*data.notes, *data.row_notes):
        print(f"note: {with_options(note, continues=True)}", file=sys.stderr, flush=True)
    if config.engine == "vllm":
        policy = without_weights(policy)
    engine = make_engine(
        config,
        VLLMConfig(),
        model_config,
        policy,
        longest_prompt=max(len(row.prompt_ids) for row in data.rows),
    )
    session = RolloutSession(
        engine,
        rule,
        cache=cache,
        seed=args.seed,
    )
    total = RolloutStats()

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal total
        # In portions, to show progress. Samples do not depend on them.
        portion = max(1, _PORTION_SLOTS * config.num_slots // config.num_samples)
        with progress(len(data) * config.num_samples, "rollout") as shown:
            shown.set_description(f"pass {pass_index}")
            for start in range(0, len(data), portion):
                chosen = data.rows[start : start + portion]
                rollouts = session.rollout(
                    [row.prompt_ids for row in chosen],
                    config.num_samples,
                    config.sampling(policy.eos_token_ids),
                    step=pass_index,
                    epoch=pass_index,
                    user_keys=[row.user_key for row in chosen],
                )
                total += rollouts.stats
                yield from _rows(rollouts, chosen, start, policy, config.num_samples)
                tokens_per_second = total.num_response_tokens / max(total.rollout_seconds, 1e-9)
                shown.set_postfix(
                    reused=f"{total.reused_fraction:.0%}",
                    tokens_per_second=f"{tokens_per_second:.0f}",
                )
                shown.update(rollouts.batch)

    _write_lines(args.out, rows())
    stats = total.as_row()
    if stats_path is not None:
        _write_lines(stats_path, [stats])
    if args.cache_out is not None:
        cache.save(args.cache_out, pass_index=pass_index)
    print(
        f"pass {pass_index}: {stats['num_rollouts']} rollouts, "
        f"{stats['num_response_tokens']} tokens, "
        f"{stats['reused_fraction']:.1%} reused, {stats['fully_reused_fraction']:.1%} of rollouts "
        "whole, "
        f"{stats['rollout_seconds']:.2f} s ({stats['verification_seconds']:.2f} s verification)",
        file=sys.stderr,
    )
    return 0


def _config(args: argparse.Namespace) -> RolloutConfig:
    """The options as a config, which checks them; its messages then name the option."""
    if args.pass_index is not None and args.pass_index < 0:
        raise ValueError(f"--pass: expected >= 0, got {args.pass_index}")
    try:
        return RolloutConfig(**options.values(args, *_REUSE, *_SAMPLING, *_ENGINE))
    except ConfigError as error:
        raise options.named(error) from None


def _pass_index(args: argparse.Namespace, cached_pass: int | None, rule: AcceptanceRule) -> int:
    """Number of this pass, on which the noise depends.

    Args:
        cached_pass: That of the rollouts in --cache-in, if the file says so.
        rule: Most rules draw new noise each pass, and would repeat that of a pass with the same
            number: every token that is rejected would be drawn again as it was.

    Raises:
        ValueError: naming the option, if the number has to be known and is not.
    """
    if args.pass_index is not None:
        if args.pass_index == cached_pass and rule.fresh_noise:
            print(
                f"note: --pass {cached_pass} is the pass that {args.cache_in} is of: with the same "
                "seed, what is rejected is drawn with the same noise again",
                file=sys.stderr,
                flush=True,
            )
        given: int = args.pass_index
        return given
    if cached_pass is not None:
        return cached_pass + 1
    if args.cache_in is not None and rule.fresh_noise and rule.uses_drafts:
        raise ValueError(
            f"--pass: expected the number of this pass, as {args.cache_in} does not say which one "
            "its rollouts are of (after a training run, a number that none of its steps had), got "
            "none"
        )
    return 0


def _rows(
    rollouts: Rollouts, prompts: Sequence[PromptRow], start: int, policy: Policy, num_samples: int
) -> Iterator[dict[str, Any]]:
    """One output row per rollout; `start` is the index of the first prompt in its file."""
    from spec_rollout.types import FinishReason

    cu = rollouts.cu_response_lens.tolist()
    ids, logprobs = rollouts.response_ids.tolist(), rollouts.logprobs.tolist()
    accepted, finish = rollouts.accepted_lens.tolist(), rollouts.finish_reasons.tolist()
    for row in range(rollouts.batch):
        index, sample = divmod(row, num_samples)
        response = ids[cu[row] : cu[row + 1]]
        yield {
            "prompt_index": start + index,
            "sample": sample,
            "prompt": prompts[index].rendered,
            "response": policy.tokenizer.decode(response, skip_special_tokens=True),
            "response_ids": response,
            "logprobs": [round(value, 6) for value in logprobs[cu[row] : cu[row + 1]]],
            "accepted_len": accepted[row],
            "finish_reason": FinishReason(finish[row]).name.lower(),
        }


def _default_stats(out: Path) -> Path | None:
    """Beside the rollouts; None where these go to a pipe or a device, which have no place beside
    them."""
    from spec_rollout.runs.outputs import is_stream

    if not out.name or out.is_dir() or is_stream(out):
        return None
    return out.with_suffix(".stats.json")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line; the file appears complete or not at all, a pipe gets the
    rows as they come."""
    from spec_rollout.runs.outputs import writing

    with writing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
