"""What `spec-rollout eval` judges: a model folder with problems, or the checkpoint of a run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spec_rollout.commands.prompt_options import naming_options, with_options
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
# Options that a run's config decides, and the key that changes it; None where there is none, or
# where a checkpoint could not be gone on with.
_OF_THE_RUN: dict[str, str | None] = {
    "num_samples": "eval.num_samples",
    "temperature": "eval.temperature",
    "top_p": None,
    "top_k": None,
    "max_tokens": "rollout.max_tokens",
    "seed": None,
    "reward": "reward.functions",
    "correct_at": "eval.correct_at",
    "engine": "rollout.engine",
    "num_slots": "rollout.num_slots",
    "max_model_len": "rollout.max_model_len",
    "dtype": None,
    "device": "model.device",
    "attention": "model.attention",
    "prompt_column": None,
    "answer_column": None,
    "data_dir": None,
    "instruction": None,
    "max_rows": "eval.num_heldout_prompts",
    "system_prompt": None,
    "raw_prompts": None,
}
_OF_TASKS = ("max_rows", "system_prompt", "raw_prompts")  # of lm-eval


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


@naming_options()
def subject_of_model(args: argparse.Namespace, suites: Sequence[str]) -> Subject:
    """The model and the problems that the options name.

    Raises:
        ValueError: naming the option or file.
    """
    if args.prompts is not None and Path(args.prompts).stem in suites:
        raise ValueError(
            f"--prompts: expected a file of another name than that of a suite, got {args.prompts!r}"
        )
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
    check_engine(config, args.attention)
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
    names = tuple(args.reward or (("math_verify",) if sources else ("exact_match",)))
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
    rows_of_all = [row for rows in parts.values() for row in rows]
    longest = max((len(row.prompt_ids) for row in rows_of_all), default=1)
    max_length = config.max_model_len or policy.max_length
    config = replace(config, max_tokens=_max_tokens(args, rows_of_all, max_length))
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

    given = args.given | {name for name in ("reward", "raw_prompts") if getattr(args, name)}
    for name, key in _OF_THE_RUN.items():
        if name in given and not (args.tasks and name in _OF_TASKS):
            hint = "" if key is None else f" (--set {key}=... changes the config)"
            raise ValueError(
                f"{options.option(name)}: expected to be left out with --run, which evaluates as "
                f"its trainer does{hint}, got {getattr(args, name)}"
            )
    if not (args.run_dir / CONFIG).is_file():
        raise ValueError(f"--run: expected the folder of a run with {CONFIG}, got {args.run_dir}")
    point = find_resume_point(args.run_dir)
    if point.checkpoint is None:
        raise ValueError(f"--run: expected a run with a checkpoint, got none in {args.run_dir}")
    for note in point.notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    config = load_config(args.run_dir / CONFIG, args.overrides)
    # Its folder may have been moved, with a store of rollouts in it.
    config = replace(config, log=replace(config.log, to=(), run_dir=str(args.run_dir)))
    # Nothing is trained: the reference of a KL need not be there.
    config = replace(config, train=replace(config.train, kl_coef=0.0))
    parts = build(config, point.checkpoint, whole_length=bool(args.tasks))
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
        progress=parts.progress(step),
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
        print(f"note: {with_options(note)}", file=sys.stderr, flush=True)
    return data.rows


def _max_tokens(args: argparse.Namespace, rows: Sequence[PromptRow], max_length: int | None) -> int:
    """The longest response: as asked for, or the published bound where there is room for it.

    Args:
        rows: Whose prompts leave room, or none.
        max_length: Most tokens of prompt and response; None if nothing bounds them.
    """
    given: int | None = args.max_tokens
    if max_length is None:
        return _PUBLISHED_MAX_TOKENS if given is None else given
    limit = "the model's" if args.max_model_len is None else "the --max-model-len of"
    row = max(rows, key=lambda row: len(row.prompt_ids), default=None)
    longest = 1 if row is None else len(row.prompt_ids)
    room = max_length - longest
    if row is not None and room < 1:
        raise ValueError(
            f"{row.source}: expected a prompt that leaves room for a response in {limit} "
            f"{max_length} tokens, got {longest} prompt tokens"
        )
    if given is None and room < _PUBLISHED_MAX_TOKENS:
        print(
            f"note: responses end after {room} tokens: of {limit} {max_length} tokens, a prompt "
            f"has {longest} (published: {_PUBLISHED_MAX_TOKENS})",
            file=sys.stderr,
            flush=True,
        )
        return room
    if given is not None and given > room:
        raise ValueError(
            f"--max-tokens: expected prompt and response to fit {limit} {max_length} tokens, "
            f"got {longest} prompt tokens + {given}"
        )
    return _PUBLISHED_MAX_TOKENS if given is None else given
