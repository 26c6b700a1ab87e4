"""`spec-rollout eval`: fresh samples of a model, judged: pass@k with confidence intervals."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec_rollout.config import options
from spec_rollout.config.sections import DataConfig, EvalConfig, ModelConfig, RolloutConfig

if TYPE_CHECKING:
    from spec_rollout.commands.eval_subject import Subject
    from spec_rollout.evals.suite_run import SuiteResult

HELP = "judge a model by fresh samples: pass@k with confidence intervals"

# The published evaluation (SPEC-RL, arXiv 2509.23232): eval/example.sh of its code.
TEMPERATURE = 1.0
TOP_P = 0.95
MAX_TOKENS = 16000

# Suites that are lm-eval's, and the tasks that they are there.
HARNESS = {"MMLU-STEM": "mmlu_stem", "IFEval": "ifeval"}

_ENGINE = ("engine", "num_slots", "max_model_len")


class _Noted(argparse.Action):
    """Stores a value, and that it was given, though it be the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = namespace.given | {self.dest}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.register("action", None, _Noted)
    parser.set_defaults(given=frozenset())
    what = parser.add_argument_group("what is judged")
    one = what.add_mutually_exclusive_group(required=True)
    one.add_argument("--model", metavar="DIR", help="Hugging Face causal LM folder")
    one.add_argument(
        "--run",
        dest="run_dir",
        type=Path,
        metavar="RUNDIR",
        help="the newest checkpoint of a training run, as its trainer evaluates it: prompts, "
        "reward, sampling, engine and seed are those of its config.toml",
    )
    what.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="with --run: override one value of the config; may be repeated",
    )
    problems = parser.add_argument_group("problems")
    problems.add_argument(
        "--suites",
        default="",
        metavar="NAMES",
        help="benchmarks, separated by commas: AMC23, AIME24, GSM8K, MATH-500, Minerva, "
        "OlympiadBench; by lm-eval MMLU-STEM, IFEval",
    )
    problems.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where the suites' files are (math500.jsonl); without it they are downloaded",
    )
    problems.add_argument(
        "--prompts", metavar="DATA", help="problems of your own: what data.path takes in a config"
    )
    options.add_options(problems, DataConfig, "prompt_column", "answer_column")
    problems.add_argument(
        "--max-rows", type=int, metavar="N", help="only the first problems of each suite"
    )
    problems.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what follows each problem of a suite (default: to put the answer in \\boxed{})",
    )
    options.add_options(problems, DataConfig, "system_prompt")
    problems.add_argument(
        "--raw-prompts",
        action="store_true",
        help="no chat template: text prompts go to the model as they are",
    )
    problems.add_argument(
        "--lm-eval",
        dest="tasks",
        default="",
        metavar="TASKS",
        help="tasks of lm-eval by their names there, separated by commas",
    )
    problems.add_argument(
        "--lm-eval-path", type=Path, metavar="DIR", help="folder with further lm-eval task files"
    )
    sampling = parser.add_argument_group("sampling")
    options.add_options(sampling, RolloutConfig, "num_samples", defaults={"num_samples": 1})
    sampling.add_argument(
        "--temperature", type=float, default=TEMPERATURE, help="0 is greedy (default: %(default)s)"
    )
    options.add_options(sampling, RolloutConfig, "top_p", "top_k", defaults={"top_p": TOP_P})
    sampling.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"longest response (default: {MAX_TOKENS}, or what the model has room for)",
    )
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument(
        "--step", type=int, metavar="N", help="the noise of the trainer's evaluation after N steps"
    )
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--reward",
        action="append",
        metavar="NAME",
        help="built-in or package.module:function; may be repeated (default: math_verify)",
    )
    options.add_options(judging, EvalConfig, "correct_at")
    judging.add_argument(
        "--pass-at", default="1", metavar="K,...", help="pass@k to print (default: %(default)s)"
    )
    judging.add_argument(
        "--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)"
    )
    engine = parser.add_argument_group("engine")
    options.add_options(engine, RolloutConfig, *_ENGINE)
    options.add_options(engine, ModelConfig, "dtype", "device", "attention")
    engine.add_argument(
        "--drafting",
        action="store_true",
        help="propose from a problem's other samples: fewer decoding steps, the same tokens",
    )
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="FILE.json", help="all figures")
    out.add_argument("--responses", type=Path, metavar="FILE.jsonl", help="every response")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: naming the option or file, before anything is written. Whatever lm-eval raises:
            figures of the suites are written then.
    """
    suites, tasks = _names(args)
    pass_at = _pass_at(args)
    if not 0 < args.confidence < 1:
        raise ValueError(f"--confidence: expected between 0 and 1, got {args.confidence}")
    if args.max_rows is not None and args.max_rows < 1:
        raise ValueError(f"--max-rows: expected at least 1, got {args.max_rows}")
    manager = _checked_tasks(args, tasks) if tasks else None
    from spec_rollout.commands.eval_subject import subject_of_model, subject_of_run
    from spec_rollout.runs.outputs import check_outputs

    check_outputs({"--out": args.out, "--responses": args.responses}, inputs=_inputs(args, suites))
    if args.run_dir is not None:
        subject = subject_of_run(args)
    else:
        subject = subject_of_model(args, suites)
    if subject.parts and max(pass_at) > subject.settings.num_samples:
        option = _option(args, "num_samples", "eval")
        raise ValueError(
            f"--pass-at: expected at most the {subject.settings.num_samples} samples of a problem "
            f"({option}), got {max(pass_at)}"
        )
    if tasks:
        _check_length(subject, args)
    results = _sampled(subject, args)
    if results:
        from spec_rollout.evals.suite_run import table

        print(table(results, pass_at, args.confidence), flush=True)
    for result in results:
        if result.num_failed:
            from spec_rollout.rewards.rewards import failures_note

            note = failures_note(result.num_failed, result.failures)
            print(f"note: {result.name}: {note}", file=sys.stderr, flush=True)
    figures: dict[str, dict[str, float]] = {}
    try:
        if tasks:
            figures = _harness(subject, tasks, manager, args)
    except BaseException:
        if results and args.out is not None:
            _write(args, subject, results, pass_at, None)
        raise
    for task, values in figures.items():
        for name, value in values.items():
            print(f"{task}  {name}  {value:.4f}")
    if args.out is not None:
        _write(args, subject, results, pass_at, figures)
    return 0


def _sampled(subject: Subject, args: argparse.Namespace) -> list[SuiteResult]:
    """Results of all parts; responses are written as they come, the file appears at the end."""
    from spec_rollout.evals.suite_run import run_suite
    from spec_rollout.runs.outputs import writing
    from spec_rollout.runs.progress import progress

    results = []
    total = sum(map(len, subject.parts.values())) * subject.settings.num_samples
    with ExitStack() as held:
        tell: Callable[[dict[str, Any]], None] | None = None
        if args.responses is not None:
            file = held.enter_context(writing(args.responses))

            def tell(row: dict[str, Any]) -> None:
                # Answers are what the file has: decimals and dates of a Parquet file, too.
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

        shown = held.enter_context(progress(total, "response"))

        def portion(result: SuiteResult, num_responses: int) -> None:
            stats = result.stats
            seconds = max(stats.rollout_seconds, 1e-9)
            solved = [correct / judged for judged, correct in result.counts if judged]
            shown.set_postfix(
                solved=f"{sum(solved) / max(1, len(solved)):.3f}",
                drafted=f"{stats.num_accepted_proposals / max(1, stats.num_response_tokens):.0%}",
                tokens_per_second=f"{stats.num_response_tokens / seconds:.0f}",
            )
            shown.update(num_responses)

        for name, rows in subject.parts.items():
            shown.set_description(name)
            results.append(
                run_suite(
                    name,
                    subject.session,
                    subject.rewards,
                    subject.policy.tokenizer,
                    rows,
                    subject.settings,
                    on_portion=portion,
                    on_response=tell,
                )
            )
    return results


def _names(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Suites of ours, and tasks of lm-eval.

    Raises:
        ValueError: for an unknown name, for options that exclude each other, or if nothing is
            asked for.
    """
    names = [name.strip() for name in args.suites.split(",") if name.strip()]
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if args.run_dir is not None:
        for option, given in (("--suites", names), ("--prompts", args.prompts)):
            if given:
                raise ValueError(
                    f"{option}: expected to be left out with --run, which evaluates the prompts of "
                    "its config (--model judges the folder `model` of a checkpoint by others)"
                )
        return [], tasks
    if args.overrides:
        raise ValueError("--set: expected --run RUNDIR, whose config it is for, got --model")
    if not names and not tasks and args.prompts is None:
        raise ValueError("eval: expected --suites, --prompts or --lm-eval, got none of them")
    from spec_rollout.evals.suites import SUITES, suite_of, unknown_name

    suites = []
    by_harness = {known.lower().replace("-", ""): task for known, task in HARNESS.items()}
    for name in names:
        suite = suite_of(name)
        task = by_harness.get(name.lower().replace("-", "").replace("_", ""))
        if suite is None and task is None:
            raise unknown_name(name, [*SUITES, *HARNESS])
        if suite is not None:
            suites.append(suite.name)
        elif task is not None:
            tasks.append(task)
    return list(dict.fromkeys(suites)), list(dict.fromkeys(tasks))


def _pass_at(args: argparse.Namespace) -> list[int]:
    try:
        values = [int(text) for text in args.pass_at.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise ValueError(f"--pass-at: expected numbers from 1 on, got {args.pass_at!r}")
    return sorted(set(values))


def _inputs(args: argparse.Namespace, suites: list[str]) -> dict[str, Path | None]:
    """Files of problems, by what names them."""
    from spec_rollout.evals.suites import SUITES, file_of
    from spec_rollout.runs.files import CONFIG

    inputs: dict[str, Path | None] = {}
    if args.prompts is not None:
        inputs["--prompts"] = Path(args.prompts)
    if args.data_dir is not None:
        for name in suites:
            inputs[f"--suites {name}"] = file_of(SUITES[name], args.data_dir)
    if args.run_dir is not None and (args.run_dir / CONFIG).is_file():
        from spec_rollout.config.toml import load_config

        config = load_config(args.run_dir / CONFIG, args.overrides)
        inputs["--run"] = args.run_dir / CONFIG
        inputs["data.path"] = Path(config.data.path)
        inputs["eval.path"] = None if config.eval.path is None else Path(config.eval.path)
    return inputs


def _checked_tasks(args: argparse.Namespace, tasks: list[str]) -> Any:
    """What knows the tasks of lm-eval.

    Raises:
        ValueError: if it is not installed, or does not have one.
    """
    from importlib.util import find_spec

    from spec_rollout.extras import install_command

    if find_spec("lm_eval") is None:
        raise ValueError(
            "eval: expected lm-eval to be installed for MMLU-STEM, IFEval and --lm-eval "
            f"({install_command('lm_eval')}), found no module lm_eval"
        )
    from spec_rollout.evals.harness import task_manager

    return task_manager(tasks, args.lm_eval_path)


def _check_length(subject: Subject, args: argparse.Namespace) -> None:
    if subject.max_length is None:
        option = _option(args, "max_model_len", "rollout")
        raise ValueError(
            f"{option}: expected a number for lm-eval, as the model does not say how many tokens "
            "it takes, got none"
        )


def _harness(
    subject: Subject, tasks: list[str], manager: Any, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    from spec_rollout.evals.harness import EngineLM, run_harness

    policy = subject.policy
    assert subject.max_length is not None  # by `_check_length`
    model = EngineLM(
        subject.session,
        policy.tokenizer,
        stop_token_ids=policy.eos_token_ids,
        max_length=subject.max_length,
        drafting=args.drafting,
    )
    return run_harness(
        model,
        tasks,
        manager,
        limit=args.max_rows,
        chat_template=not args.raw_prompts and policy.tokenizer.chat_template is not None,
        system_prompt=args.system_prompt,
    )


def _option(args: argparse.Namespace, name: str, section: str) -> str:
    """What sets a value: with --run a key of its config."""
    return options.option(name) if args.run_dir is None else f"--set {section}.{name}"


def _write(
    args: argparse.Namespace,
    subject: Subject,
    results: list[SuiteResult],
    pass_at: list[int],
    figures: dict[str, dict[str, float]] | None,
) -> None:
    """Writes `--out`; `figures` are lm-eval's, None if it did not come to them."""
    from spec_rollout.evals.suite_run import mean_of
    from spec_rollout.runs.environment import environment
    from spec_rollout.runs.outputs import write_text

    sampling = subject.settings.sampling
    content = {
        "model": subject.name,
        "settings": {
            "num_samples": subject.settings.num_samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "seed": subject.session.seed,
            "step": subject.settings.step,
            "reward": list(subject.reward_names),
            "correct_at": subject.settings.correct_at,
            "engine": type(subject.session.engine).__name__,
            "drafting": subject.settings.drafting,
            "confidence": args.confidence,
        },
        "suites": [result.figures(pass_at, args.confidence) for result in results],
        "mean": {f"pass@{k}": mean_of(results, k) for k in pass_at},
        "lm_eval": figures,
        "environment": environment(),
    }
    write_text(args.out, json.dumps(content, indent=2) + "\n")
    print(f"wrote {args.out}", file=sys.stderr)
