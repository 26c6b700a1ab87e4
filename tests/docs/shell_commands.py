"""Whether a command that a page shows is one that works here: its form, without running it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path

from code_blocks import ROOT
from packaging.requirements import Requirement

from spec_rollout import cli
from spec_rollout.config.toml import from_dict, load_config

# Programs of the system, and those that a block must be marked for.
_SYSTEM = ("cd", "source", "git")
_EXTERNAL = {"vllm": "vllm", "docker": "network", "cibuildwheel": "network", "nvidia-smi": "gpu"}
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")


def check(command: str, needs: frozenset[str] = frozenset()) -> None:
    """Raises AssertionError if the command names a program, file, target, option or config key that
    is not there."""
    words = shlex.split(command)
    while words and _ASSIGNMENT.match(words[0]):
        words.pop(0)
    if words:
        program = re.sub(r"^\.venv(-vllm)?/bin/", "", words[0])
        _check_program(program, words[1:], needs)


def _check_program(program: str, arguments: Sequence[str], needs: frozenset[str]) -> None:
    if program == "make":
        _check_make(arguments)
    elif program == "spec-rollout":
        _check_spec_rollout(arguments)
    elif program in ("python", "python3"):
        _check_python(arguments)
    elif program == "pip":
        _check_pip(arguments)
    elif program.startswith((".ci/", "tools/")):
        assert (ROOT / program).is_file(), f"{program}: no such file"
        assert (ROOT / program).stat().st_mode & 0o111, f"{program}: not executable"
    elif program in _EXTERNAL:
        assert _EXTERNAL[program] in needs, f"{program}: expected the mark needs: {program}"
    elif program not in _SYSTEM:
        extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        known = {Requirement(r).name for group in extra.values() for r in group}
        assert program in known, f"{program}: a program this test does not know"


def _check_make(arguments: Sequence[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    for argument in arguments:
        if "=" in argument:
            name = argument.partition("=")[0]
            assert re.search(rf"\b{name}\b", text), f"{name}: no variable of the Makefile"
        elif not argument.startswith("-"):
            assert argument in targets, f"make {argument}: no such target"


def _check_spec_rollout(arguments: Sequence[str]) -> None:
    if "--help" in arguments:
        return
    if arguments[:1] == ["demo"]:  # its options are its own
        _check_options(ROOT / "spec_rollout" / "commands" / "demo.py", arguments[1:])
        return
    options = [argument for argument in arguments if argument != "..."]
    args = cli._parser().parse_args(options)
    if args.command == "train" and not args.resume:
        # A file of the reader's own stands for any config.
        shown = ROOT / str(args.config)
        path = shown if shown.is_file() else ROOT / "examples" / "tiny.toml"
        assert shown.is_file() or "/" not in str(args.config), f"{args.config}: no such file"
        load_config(path, args.overrides)


def _check_python(arguments: Sequence[str]) -> None:
    first, *rest = arguments
    if first == "-c":
        compile(rest[0], "-c", "exec")
    elif first == "-m" and rest[0] == "pip":
        _check_pip(rest[1:])
    elif first == "-m":
        spec = importlib.util.find_spec(rest[0])
        assert spec is not None, f"{rest[0]}: no such module"
        if rest[0].startswith("spec_rollout"):
            assert spec.origin is not None
            _check_options(Path(spec.origin), rest[1:])
    else:
        assert (ROOT / first).is_file(), f"{first}: no such file"
        _check_options(ROOT / first, rest)


def _check_options(script: Path, arguments: Sequence[str]) -> None:
    """Every `--option` stands in the script, or in what benchmarks share."""
    shared = script.parent.glob("_*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in (script, *shared))
    text += (ROOT / "benchmarks" / "_common.py").read_text(encoding="utf-8")
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--"):
            assert f'"{option}"' in text, f"{script.name}: no option {option}"


def _check_pip(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] not in ("install", "wheel"):
        assert arguments[:1] in (["uninstall"], ["download"]), f"pip {arguments[:1]}"
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for argument in arguments[1:]:
        if argument.startswith("-") or argument.endswith(".whl") or "://" in argument:
            continue
        name, bracket, extras = argument.partition("[")
        if name in (".", project["name"]) and bracket:
            unknown = set(extras.rstrip("]").split(",")) - set(project["optional-dependencies"])
            assert not unknown, f"{argument}: no extra {unknown}"
        elif name != "." and not (ROOT / name).exists():
            Requirement(argument)


def check_toml(text: str) -> None:
    """A part of a config: with the example's values for what it leaves out, it must load."""
    base = tomllib.loads((ROOT / "examples" / "tiny.toml").read_text(encoding="utf-8"))
    for section, values in tomllib.loads(text).items():
        base[section] = {**base.get(section, {}), **values}
    from_dict(base)
