"""Every block of code in the pages runs, or its form is checked, or it is marked as needing what is
not there."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import shell_commands
import torch
from code_blocks import (
    ROOT,
    Block,
    all_blocks,
    blocks_of,
    commands_of,
    needs_of,
    python_groups,
    run,
)

BLOCKS = all_blocks()
GROUPS = python_groups(BLOCKS)
SHELL = ("bash", "indented")
# Nothing of them runs: drawings and formulas, and the citation.
PROSE = ("", "text", "bibtex")
KINDS = ("python", "toml", "json", *SHELL, *PROSE)
# Commands of pages that are run: they take seconds and write nothing.
CHEAP = ("spec-rollout doctor", "spec-rollout --help", "spec-rollout --version", "make help")


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert len(BLOCKS) > 10
    assert [f"{block}: {block.language}" for block in BLOCKS if block.language not in KINDS] == []


@functools.cache
def printed_by(index: int) -> str:
    return run(GROUPS[index])[1]


@pytest.mark.parametrize("index", range(len(GROUPS)), ids=[str(group[0]) for group in GROUPS])
def test_python_runs(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_of(GROUPS[index])
    if "vllm" in needs:
        for block in GROUPS[index]:
            compile(block.text, block.page, "exec")
        pytest.skip("runs with the plugin's tests")
    if "gpu" in needs and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert "network" not in needs, "Python of the pages runs without a network"
    monkeypatch.chdir(tmp_path)
    printed_by(index)


def test_the_example_of_the_readme_reuses_what_it_generated() -> None:
    index = next(i for i, group in enumerate(GROUPS) if group[0].page == "README.md")
    first, second = printed_by(index).splitlines()
    assert re.fullmatch(r"0% reused, [1-9]\d* decoding steps", first)
    # The policy did not change: everything is kept.
    assert second == "100% reused, 0 decoding steps"


@pytest.mark.parametrize("block", of(*SHELL), ids=str)
def test_commands_name_what_is_there(block: Block) -> None:
    commands = list(commands_of(block))
    assert commands
    for command in commands:
        shell_commands.check(command, block.needs)


SHOWN = {command for block in of(*SHELL) for command in commands_of(block)}


@pytest.mark.parametrize("command", sorted(SHOWN.intersection(CHEAP)))
def test_cheap_commands_run(command: str) -> None:
    program, *arguments = shlex.split(command)
    prefix = [sys.executable, "-m", "spec_rollout.cli"] if program == "spec-rollout" else [program]
    done = subprocess.run(
        [*prefix, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("block", of("toml", "json"), ids=str)
def test_data_loads(block: Block) -> None:
    if block.language == "toml":
        shell_commands.check_toml(block.text)
    else:
        json.loads(block.text)


@pytest.mark.parametrize("block", of(*PROSE), ids=str)
def test_prose_hides_no_code(block: Block) -> None:
    start = re.compile(r"\s*(\$ |make |pip |python3? |spec-rollout |vllm |from \w+ import|import )")
    assert [line for line in block.text.split("\n") if start.match(line)] == []


# What the checks find.


def test_blocks_are_found_with_their_marks_and_lines() -> None:
    text = (
        "a\n\n<!-- needs: vllm, gpu; given: x, y -->\n```python\nf(x)\n```\n"
        "<!-- continues -->\n```python\ng()\n```\n\n    make demo\n    make test\n\n"
        "- item\n\n    of the list\n\n  ```bash\n  make demo\n  ```\n"
    )
    assert blocks_of("p.md", text) == [
        Block("p.md", 5, "python", "f(x)\n", frozenset({"vllm", "gpu"}), ("x", "y")),
        Block("p.md", 9, "python", "g()\n", continues=True),
        Block("p.md", 12, "indented", "make demo\nmake test\n\n"),
        Block("p.md", 20, "bash", "make demo\n"),
    ]
    (group,) = python_groups(blocks_of("p.md", text))
    assert needs_of(group) == {"vllm", "gpu"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nf()\n", "p.md:1: expected '```' after it"),
        ("<!-- needs: tpu -->\n```python\n```\n", "p.md:1: expected needs: .* got 'needs: tpu'"),
        ("<!-- given: -->\n```python\n```\n", "p.md:1: expected needs: .* got 'given:'"),
        ("<!-- needs: gpu -->\n\n```python\n```\n", "p.md:1: expected a block of code after"),
    ],
)
def test_a_mark_or_fence_that_is_wrong_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks_of("p.md", text)


def test_blocks_of_a_group_share_their_names() -> None:
    text = "```python\na = 1\n```\n<!-- continues -->\n```python\nprint(a + 1)\n```\n"
    (group,) = python_groups(blocks_of("p.md", text))
    assert run(group)[1] == "2\n"
    with pytest.raises(NameError):
        run(group[1:])


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "make demo SPEED=9",
        "spec-rollout trane",
        "spec-rollout train run.toml --sett a=b",
        "spec-rollout train run.toml --set rollout.rul=lenient",
        "spec-rollout train examples/none.toml",
        "spec-rollout demo --nothing",
        "python benchmarks/none.py",
        "python benchmarks/bench_rollout.py --nothing",
        "python -m spec_rollout.train.config",
        "python -c 'print('",
        "pip install '.[nothing]'",
        "pip install 'spec-rollout[nothing]'",
        ".ci/none",
        "vllm serve model",
        "frobnicate",
    ],
)
def test_a_command_that_would_fail_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ValueError, SyntaxError, cli_error())):
        shell_commands.check(command)


def cli_error() -> type[Exception]:
    from spec_rollout.cli import UsageError

    return UsageError


def test_a_config_with_an_unknown_key_is_found() -> None:
    with pytest.raises(ValueError, match=r"rollout\.rul: unknown key"):
        shell_commands.check_toml('[rollout]\nrul = "lenient"\n')
    with pytest.raises(tomllib.TOMLDecodeError):
        shell_commands.check_toml("[rollout\n")
