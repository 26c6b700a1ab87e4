"""What `spec-rollout eval` judges: a model folder with problems, or the checkpoint of a run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spec_rollout.config import options
from spec_rollout.config.sections import (
    ConfigError,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    VLLMConfig,
)
from spec_rollout.config.toml import load_config
from spec_rollout.evals.suite_run import EvalSettings
from spec_rollout.evals.suites import INSTRUCTION, SUITES, load_suite
from spec_rollout.loading.data import (
    PromptRow,
    SourceRow,
    check_rows,
    read_rows,
    render_rows,
)
from spec_rollout.loading.engines import check_engine, make_engine, without_weights
from spec_rollout.loading.policy import Policy, load_policy
from spec_rollout.loading.prompts import PromptRenderer
from spec_rollout.rewards import Rewards
from spec_rollout.rollout import RolloutSession
from spec_rollout.runs.files import CONFIG
from spec_rollout.types import SamplingParams

_PUBLISHED_MAX_TOKENS = 16000
_SAMPLING = ("num_samples", "top_p", "top_k")
_ENGINE = ("engine", "num_slots", "max_model_len")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model ready to be judged.

    Attributes:
        name: Its folder.
        parts: Problems by the name of their suite.
        max_length: Most tokens of prompt and response; None if nothing bounds them.
        reward_names: Of the functions in `rewards`.
    """

    name: str
    policy: Policy
    session: RolloutSession
    rewards: Rewards
    reward_names: tuple[str, ...]
    parts: dict[str, Sequence[PromptRow]]
    settings: EvalSettings
    max_length: int | None


def subject_of_model(args: argparse.Namespace, suites: Sequence[str]) -> Subject:
    """The model and the problems that the options name.

    Raises:
        ValueError: naming the option or file.
    """
    if args.temperature < 0:
        raise ValueError(f"--temperature: expected >= 0, got {args.temperature}")
    try:
        # Sampling takes its temperature below: greedy, which training does not have, is one here.
        config = RolloutConfig(
            **options.values(args, *_SAMPLING, *_ENGINE),
            max_tokens=args.max_tokens if args.max_tokens is not None else _PUBLISHED_MAX_TOKENS,
            rule="none",
            reuse=False,
        )
    except ConfigError as error:
        raise options.named(error) from None
    check_engine(config)
    sources: dict[str, list[SourceRow]] = {}
    instruction = INSTRUCTION if args.instruction is None else args.instruction
    for name in suites:
        sources[name] = load_suite(
            SUITES[name], args.data_dir, instruction=instruction, max_rows=args.max_rows
        )
    if args.prompts is not None:
        answers = None if args.answer_column == "none" else args.answer_column
        sources[Path(args.prompts).stem] = read_rows(
            args.prompts,
            prompt_column=args.prompt_column,
            answer_column=answers,
            max_rows=args.max_rows,
        )
    names = tuple(args.rewards or (("math_verify",) if sources else ("exact_match",)))
    columns = (
        set.intersection(*(set(rows[0].columns) for rows in sources.values())) if sources else None
    )
    rewards = Rewards(RewardConfig(functions=names, folder=os.getcwd()), columns)
    for rows in sources.values():
        check_rows(rows, rewards)
    # vLLM puts its own copy of the weights where it computes.
    device = "cpu" if config.engine == "vllm" else args.device
    model = ModelConfig(args.model, dtype=args.dtype, device=device, attention=args.attention)
    policy = load_policy(model)
    parts = {name: _rendered(name, rows, policy, args) for name, rows in sources.items()}
    longest = max((len(row.prompt_ids) for rows in parts.values() for row in rows), default=1)
    max_length = config.max_model_len or policy.max_length
    config = replace(config, max_tokens=_max_tokens(args.max_tokens, longest, max_length))
    if config.engine == "vllm":
        policy = without_weights(policy)
        if args.tasks or not parts:
            config = replace(config, max_model_len=max_length)
    engine = make_engine(config, VLLMConfig(), model, policy, longest_prompt=longest)
    sampling = replace(config.sampling(policy.eos_token_ids), temperature=float(args.temperature))
    session = RolloutSession(engine, config.acceptance(), seed=args.seed, reuse=False)
    return Subject(
        args.model,
        policy,
        session,
        rewards,
        names,
        dict(parts),
        _settings(args, config.num_samples, sampling, args.step or 0, args.correct_at, config),
        max_length,
    )


def subject_of_run(args: argparse.Namespace) -> Subject:
    """The newest whole checkpoint of a run, with everything as its config has it.

    Raises:
        ValueError: if there is no checkpoint, or an option is given that the config decides.
    """
    from spec_rollout.train.components import build
    from spec_rollout.train.resume_point import find_resume_point

    defaults: dict[str, Any] = {"num_samples": 1, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    keys = {"num_samples": "eval.num_samples", "temperature": "eval.temperature"}
    for name, default in defaults.items():
        if getattr(args, name) != default:
            key = keys.get(name, f"rollout.{name}")
            raise ValueError(
                f"{options.option(name)}: expected to be left out with --run (--set {key}=... "
                f"changes the config), got {getattr(args, name)}"
            )
    if not (args.run_dir / CONFIG).is_file():
        raise ValueError(f"--run: expected the folder of a run with {CONFIG}, got {args.run_dir}")
    point = find_resume_point(args.run_dir)
    if point.checkpoint is None:
        raise ValueError(f"--run: expected a run with a checkpoint, got none in {args.run_dir}")
    for note in point.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    config = load_config(args.run_dir / CONFIG, args.overrides)
    parts = build(replace(config, log=replace(config.log, to=())), point.checkpoint)
    if not parts.eval_rows:
        raise ValueError(
            f"--run: expected a config with prompts to evaluate (eval.path, eval.num_train_prompts)"
            f", got none in {args.run_dir / CONFIG}"
        )
    step = parts.state.step if args.step is None else args.step
    settings = EvalSettings(
        num_samples=config.eval.num_samples,
        sampling=parts.eval_sampling,
        step=step,
        correct_at=config.eval.correct_at,
        keep_special_tokens=config.reward.keep_special_tokens,
        drafting=args.drafting,
        portion=_portion(config.rollout),
    )
    return Subject(
        str(point.checkpoint),
        parts.policy,
        parts.session,
        parts.rewards,
        config.reward.functions,
        dict(parts.eval_rows),
        settings,
        parts.policy.max_length,
    )


def _settings(
    args: argparse.Namespace,
    num_samples: int,
    sampling: SamplingParams,
    step: int,
    correct_at: float,
    config: RolloutConfig,
) -> EvalSettings:
    return EvalSettings(
        num_samples=num_samples,
        sampling=sampling,
        step=step,
        correct_at=correct_at,
        drafting=args.drafting,
        portion=_portion(config),
    )


def _portion(config: RolloutConfig) -> int:
    """Responses between two updates of the progress bar."""
    return 16 * config.num_slots


def _rendered(
    name: str, rows: Sequence[SourceRow], policy: Policy, args: argparse.Namespace
) -> Sequence[PromptRow]:
    renderer = PromptRenderer(
        policy.tokenizer,
        vocab_size=policy.vocab_size,
        chat_template=False if args.raw_prompts else None,
        system_prompt=args.system_prompt,
    )
    data = render_rows(rows, renderer, name)
    for note in (*data.notes, *data.row_notes):
        print(f"note: {note}", file=sys.stderr, flush=True)
    return data.rows


def _max_tokens(given: int | None, longest: int, max_length: int | None) -> int:
    """The longest response: as asked for, or the published bound where the model has room."""
    room = None if max_length is None else max_length - longest
    if given is None:
        if room is None or room >= _PUBLISHED_MAX_TOKENS:
            return _PUBLISHED_MAX_TOKENS
        if room >= 1:
            print(
                f"note: responses end after {room} tokens: the model takes {max_length}, a prompt "
                f"has {longest} (published: {_PUBLISHED_MAX_TOKENS})",
                file=sys.stderr,
                flush=True,
            )
            return room
        given = 1
    if room is not None and given > room:
        raise ValueError(
            f"--max-tokens: expected prompt and response to fit the model's {max_length} tokens, "
            f"got {longest} prompt tokens + {given}"
        )
    return given
