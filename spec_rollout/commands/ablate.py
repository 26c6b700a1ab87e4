"""`spec-rollout ablate`: what reuse saves and costs, over rules and seeds, for one config.

Every variant starts from the same weights on the same prompts, and differs in section `rollout`
alone. A grid that was ended goes on where it was: the same command again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "compare rules of reuse over seeds, on one page"
DEMO = "demo"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG.toml",
        help=f"TOML file of a run; {DEMO} is the demo's model, task and prompts",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the config; may be repeated",
    )
    parser.add_argument(
        "--lenience",
        metavar="X,...",
        help="values of log_lenience of the published rule; inf reuses whole rollouts",
    )
    parser.add_argument(
        "--baselines",
        metavar="NAME,...",
        help="random-reuse (whole rollouts, by chance) and random-cut (up to a uniform place)",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="[NAME:] KEY=VALUE,...",
        help="one more variant: keys of section rollout, lenient unless it says otherwise, such as "
        "fresh_share=0.5; may be repeated",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="from the config's on (default: 1)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), help="default: %(default)s"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="also write ablation.json and report.html here"
    )


def run(args: argparse.Namespace) -> int:
    """Trains what is left of the grid and writes its page.

    Raises:
        ValueError: naming option or key, before anything is written.
    """
    for option in ("seeds", "jobs"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option}: expected at least 1, got {getattr(args, option)}")
    from spec_rollout.ablate.variants import variants
    from spec_rollout.config.toml import load_config

    found = variants(args.lenience, args.baselines, args.also)
    if len(found) < 2:
        raise ValueError("ablate: expected --lenience, --baselines or --also, got none of them")
    if args.config == DEMO:
        from spec_rollout.demo.preset import ablation_config, write_prompts

        config = ablation_config(args.out, args.overrides)
    else:
        from spec_rollout.commands.train import finding_modules_beside

        config = load_config(args.config, args.overrides)
        config = finding_modules_beside(Path(args.config), config)

    from spec_rollout.ablate.run import Ablation

    ablation = Ablation(config, found, args.seeds, args.out)
    ablation.begin()
    if args.config == DEMO:
        write_prompts(args.out)
    content = ablation.finish(args.jobs, _shown(args), args.results)
    print(content["text"])
    return 0


def _shown(args: argparse.Namespace) -> list[str]:
    """The command, without where a machine keeps its folders, which is nobody else's business."""
    arguments = args.argv[1:]
    shown = [Path(text).name if Path(text).is_absolute() else text for text in arguments]
    return ["spec-rollout", "ablate", *shown]
