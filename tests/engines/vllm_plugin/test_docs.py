"""The code blocks of the pages that need vLLM: Python runs, `vllm serve` is read by vLLM's own
parser."""

from __future__ import annotations

import gc
import shlex
from typing import Any

import pytest
from code_blocks import Block, all_blocks, commands_of, needs_of, python_groups, run

BLOCKS = all_blocks()
GROUPS = [group for group in python_groups(BLOCKS) if "vllm" in needs_of(group)]
SERVE = [
    command
    for block in BLOCKS
    if block.language == "bash"
    for command in commands_of(block)
    if command.startswith("vllm serve")
]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: str(group[0]))
def test_python_runs(group: list[Block]) -> None:
    names, printed = run(group)
    if group[0].page == "README.md":
        # The policy did not change, and the rule is lossless.
        assert printed.splitlines() == ["0% reused", "100% reused"]
    names.clear()
    gc.collect()  # an engine's KV cache is a gigabyte


@pytest.mark.parametrize("command", SERVE)
def test_a_server_gets_the_arguments_of_the_plugin(command: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from spec_rollout import engine_args

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", *shlex.split(command)[2:]])
    wanted: dict[str, Any] = engine_args()
    assert args.speculative_config == wanted["speculative_config"]
    assert args.worker_extension_cls == wanted["worker_extension_cls"]
    assert args.logprobs_mode == wanted["logprobs_mode"]
    assert AsyncEngineArgs.from_cli_args(args).model == "MODEL"


def test_there_is_something_to_run() -> None:
    assert {group[0].page for group in GROUPS} >= {"README.md", "docs/vllm.md"}
    assert SERVE
