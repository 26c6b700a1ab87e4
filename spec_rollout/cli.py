"""The command line: `spec-rollout train|rollout|ablate|eval|report|demo|vllm-args|cache|doctor`.

A file per command is in `spec_rollout.commands`. torch is not imported before a command runs, so
that help and errors come at once. A failure is one line on stderr and exit status 2;
SPEC_ROLLOUT_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

from spec_rollout.extras import TRAIN, install_command

# Modules of `spec_rollout.commands` with HELP, add_options(parser) and run(args); they import what
# they need when they run.
_COMMANDS = ("train", "rollout", "ablate", "eval", "report", "demo", "vllm-args", "cache")


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
    for name in _COMMANDS:
        module = import_module(f"spec_rollout.commands.{name.replace('-', '_')}")
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, allow_abbrev=False
        )
        module.add_options(command)
        command.set_defaults(run=module.run)
    doctor = commands.add_parser(
        "doctor", help="what was built, what is missing and how to fix it", allow_abbrev=False
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _doctor(args: argparse.Namespace) -> int:
    from spec_rollout.commands import doctor

    return doctor.main(as_json=args.json)


def _one_line(error: BaseException) -> str:
    """The message of an error; with its type and how to learn more if it was not foreseen."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and error.name in TRAIN:
        missing = _missing_packages(error.name)
        are = "is" if len(missing) == 1 else "are"
        return f"{', '.join(missing)} {are} not installed: {install_command(*missing)}"
    foreseen = isinstance(error, UsageError | ValueError | OSError)
    if foreseen and text:
        return text
    return f"{type(error).__name__}: {text} (SPEC_ROLLOUT_DEBUG=1 shows where)"


def _missing_packages(first: str) -> list[str]:
    """All packages of the extra that are missing, not only the first that an import met."""
    return [name for name in TRAIN if name == first or not _is_installed(name)]


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # kept from being imported
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        parser = _parser()
        args = parser.parse_args(argv)
        args.argv = list(sys.argv[1:] if argv is None else argv)
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
