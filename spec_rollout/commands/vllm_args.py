"""`spec-rollout vllm-args`: what puts engine-side reuse into a vLLM, as flags and as JSON."""

from __future__ import annotations

import argparse
import json
import shlex

HELP = "print the vLLM arguments that switch reuse on"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "options",
        nargs="?",
        default="drafting",
        metavar="OPTIONS",
        help="as in the variable SPEC_ROLLOUT: drafting (default), coupled, lenient, or JSON",
    )
    parser.add_argument(
        "--model-runner",
        choices=("v1", "v2"),
        help="of vLLM's, that the engine is to run on (default: v1, unless "
        "VLLM_USE_V2_MODEL_RUNNER=1 is set)",
    )
    parser.add_argument(
        "--json", action="store_true", help="as JSON, for LLM(**arguments) and config files"
    )


def run(args: argparse.Namespace) -> int:
    """Prints them.

    Raises:
        ValueError: if the options are wrong, or switch nothing on.
    """
    from spec_rollout.engines.vllm.options import EngineOptions, chosen_runner

    options = EngineOptions.from_text(args.options, source="OPTIONS")
    if not options.is_on:
        raise ValueError("OPTIONS: expected drafting, coupled or lenient, got off")
    arguments = options.vllm_arguments(args.model_runner or chosen_runner())
    if args.json:
        print(json.dumps(arguments, indent=2))
        return 0
    print(
        " ".join(
            f"--{name.replace('_', '-')} {shlex.quote(json.dumps(value))}"
            for name, value in arguments.items()
        )
    )
    return 0
