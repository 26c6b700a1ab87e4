"""The command line: `spec-rollout train|rollout|report|demo|doctor`.

Nothing but argparse is imported before a command is known, so that help and errors come at once. A
failure is one line on stderr and exit status 2; SPEC_ROLLOUT_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_RULES = ("lenient", "coupled", "one_hot", "random_reuse", "random_cut", "none")
_TRAIN_PACKAGES = ("matplotlib", "safetensors", "tomli_w", "tqdm", "transformers")


class UsageError(Exception):
    """The command line itself is wrong; the message is complete."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing usage and exiting, so that every error looks alike."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.metavar or action.dest
            near = difflib.get_close_matches(str(value), map(str, action.choices), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            expected = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(
                None, f"{name}: expected one of {expected}, got {value}{hint}"
            )


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: a script written today must not change its meaning when an option is added.
    parser = _Parser(prog="spec-rollout", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", parser_class=_Parser, required=False
    )

    train = commands.add_parser("train", help="train a policy", allow_abbrev=False)
    train.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml", help="TOML file")
    train.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the config; may be repeated",
    )
    train.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=True,
        metavar="RUNDIR",
        help="continue the run in RUNDIR (or in the run_dir of CONFIG.toml) from its last "
        "checkpoint, with the config saved there",
    )
    train.set_defaults(run=_train)

    rollout = commands.add_parser(
        "rollout", help="one rollout pass over a file of prompts", allow_abbrev=False
    )
    _add_rollout_options(rollout)
    rollout.set_defaults(run=_rollout)

    report = commands.add_parser("report", help="write report.html of runs", allow_abbrev=False)
    report.add_argument(
        "run_dirs",
        type=Path,
        nargs="+",
        metavar="RUNDIR",
        help="a run, or a folder of runs; several are compared on one page",
    )
    report.add_argument(
        "--out", type=Path, help="file to write (default: report.html in the first RUNDIR)"
    )
    report.set_defaults(run=_report)

    demo = commands.add_parser(
        "demo",
        help="train a tiny shipped model plain, with lenient and with lossless reuse",
        add_help=False,
        allow_abbrev=False,
    )
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor", help="what was built, what is missing and how to fix it", allow_abbrev=False
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_rollout_options(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face causal LM folder"
    )
    files.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl")
    files.add_argument("--prompt-column", default="prompt", metavar="NAME")
    files.add_argument(
        "--out", type=Path, required=True, metavar="FILE.jsonl", help="one row per rollout"
    )
    files.add_argument(
        "--stats", type=Path, metavar="FILE.json", help="default: OUT with .stats.json"
    )
    files.add_argument("--cache-in", type=Path, metavar="FILE", help="rollouts of an earlier pass")
    files.add_argument(
        "--cache-out", type=Path, metavar="FILE", help="these rollouts, for the next pass"
    )

    rule = parser.add_argument_group("reuse")
    rule.add_argument("--rule", choices=_RULES, default="coupled", help="default: %(default)s")
    rule.add_argument("--log-lenience", type=float, help="default: 0.5 (lenient), 0 (coupled)")
    rule.add_argument("--scale", type=float, default=1.0, help="of the rule lenient")
    rule.add_argument("--min-target-prob", type=float, default=0.0, help="of the rule lenient")
    rule.add_argument("--reuse-prob", type=float, default=0.5, help="of the rule random_reuse")
    rule.add_argument(
        "--pass",
        dest="pass_index",
        type=int,
        default=0,
        metavar="N",
        help="0-based number of this pass; rules other than coupled draw new noise each pass",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--num-samples", type=int, default=1, help="responses per prompt")
    sampling.add_argument("--max-tokens", type=int, default=256, help="default: %(default)s")
    sampling.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    sampling.add_argument("--top-k", type=int, default=0, help="0 is off")
    sampling.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    sampling.add_argument("--seed", type=int, default=0)

    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    engine.add_argument("--num-slots", type=int, default=64, help="rows decoded at once")
    engine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    engine.add_argument("--device", default="auto", help="auto, cpu or cuda[:n]")


def _train(args: argparse.Namespace) -> int:
    from spec_rollout.commands.train import train

    return train(args.config, args.overrides, args.resume)


def _rollout(args: argparse.Namespace) -> int:
    from spec_rollout.commands.rollout import rollout

    return rollout(args)


def _report(args: argparse.Namespace) -> int:
    from spec_rollout.report import find_runs, load_run, write_report

    runs = [load_run(path) for directory in args.run_dirs for path in find_runs(directory)]
    print(write_report(runs, args.out or args.run_dirs[0] / "report.html"))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from spec_rollout.commands.demo import main as demo

    return demo(args.rest)


def _doctor(args: argparse.Namespace) -> int:
    from spec_rollout.commands.doctor import main as doctor

    return doctor(as_json=args.json)


def _one_line(error: BaseException) -> str:
    """The message of an error the program foresaw; for others also the type and how to learn
    more."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and error.name in _TRAIN_PACKAGES:
        return f"{error.name} is not installed: pip install 'spec-rollout[train]'"
    foreseen = isinstance(error, UsageError | ValueError | OSError)
    if foreseen and text:
        return text
    return f"{type(error).__name__}: {text} (SPEC_ROLLOUT_DEBUG=1 shows where)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        parser = _parser()
        # The demo has its own options; for all other commands, what is left over is a mistake.
        args, args.rest = parser.parse_known_args(argv)
        if args.rest and args.command != "demo":
            parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
        if args.version:
            from spec_rollout.runs.environment import package_version

            print(package_version("spec-rollout") or "not installed as a package")
            return 0
        if args.command is None:
            parser.print_help()
            return 2
        if argv is None:  # a program of its own; who passes arguments has a process to care for
            from spec_rollout.commands.malloc import keep_freed_memory

            keep_freed_memory()
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("SPEC_ROLLOUT_DEBUG") == "1":
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
