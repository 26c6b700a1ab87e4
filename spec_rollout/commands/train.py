"""`spec-rollout train`: a training run from a TOML file, or the rest of an interrupted one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spec_rollout.config.sections import RunConfig

HELP = "train a policy"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml", help="TOML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the config; may be repeated",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=True,
        metavar="RUNDIR",
        help="continue the run in RUNDIR (or in the run_dir of CONFIG.toml) from its last "
        "checkpoint, with the config saved there",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Raises:
        ValueError: naming file and key, before anything is written.
    """
    return train(args.config, args.overrides, args.resume)


def train(
    config_path: Path | None, overrides: Sequence[str], resume_dir: Path | bool | None
) -> int:
    """Trains, or continues a run, and writes its report.

    Args:
        config_path: TOML file.
        overrides: "section.key=value" each.
        resume_dir: Folder of the run to continue; True continues the one that the config names.

    Raises:
        ValueError: naming file and key, before anything is written.
    """
    if resume_dir is None or resume_dir is True:
        if config_path is None:
            raise ValueError("train: expected CONFIG.toml or --resume RUNDIR, got neither")
    elif config_path is not None:
        raise ValueError(
            "train: expected CONFIG.toml or --resume RUNDIR, got both "
            f"({config_path}, {resume_dir}); a resumed run has its own config, --set overrides it"
        )
    from spec_rollout.config.toml import dump_config, load_config

    # The config is read before torch is loaded: mistakes in it show at once.
    config = None
    if config_path is not None:
        config = finding_modules_beside(config_path, load_config(config_path, overrides))

    from spec_rollout.report import load_run, write_report
    from spec_rollout.train.trainer import resume
    from spec_rollout.train.trainer import run as train_run

    if resume_dir is None:
        assert config is not None
        print(dump_config(config), flush=True)
        summary = train_run(config)
    else:
        folder = Path(config.log.run_dir) if config is not None else resume_dir
        assert isinstance(folder, Path)
        summary = resume(folder, overrides)
    run_dir = Path(summary.run_dir)
    report = write_report([load_run(run_dir)], run_dir / "report.html")
    print(
        f"{summary.totals.steps} steps, {summary.totals.rollout_seconds:.1f} s in rollouts, "
        f"{summary.totals.reused_fraction:.1%} of response tokens reused; report: {report}",
        file=sys.stderr,
    )
    return 0


def finding_modules_beside(config_path: Path, config: RunConfig) -> RunConfig:
    """Modules of reward functions are looked for in the config file's folder, on resume too."""
    reward = config.reward
    if reward.folder is not None or not any(":" in name for name in reward.functions):
        return config
    return replace(config, reward=replace(reward, folder=str(config_path.resolve().parent)))
