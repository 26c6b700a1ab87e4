"""A grid from its config to ablation.json and report.html."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from spec_rollout.ablate.inputs import inputs_of
from spec_rollout.ablate.page import ablation_page
from spec_rollout.ablate.results import load_runs, mean_runs, results
from spec_rollout.ablate.study import DEFINITION, Study, begin, check_inputs
from spec_rollout.ablate.table import variants_table
from spec_rollout.ablate.variants import Variants
from spec_rollout.ablate.workers import is_finished, train_all
from spec_rollout.config.sections import RunConfig
from spec_rollout.loading.policy import load_policy
from spec_rollout.runs.environment import environment
from spec_rollout.runs.files import CONFIG, SUMMARY, write_atomically
from spec_rollout.runs.outputs import check_outputs
from spec_rollout.runs.progress import clock_time
from spec_rollout.train.components import limited, read_data, render_data

JSON, PAGE = "ablation.json", "report.html"
# Of the first seed; the others of them would only make the page large.
_WITH_SAMPLES = 3
_NUM_SAMPLES = 2


class Ablation:
    """One grid.

    Args:
        config: Of every run. Without `eval.every_steps` each is judged after every epoch.
        variants: From `variants`.
        num_seeds: From the config's seed on.
        out: Folder of everything.
    """

    def __init__(self, config: RunConfig, variants: Variants, num_seeds: int, out: Path) -> None:
        first = config.train.seed
        self._study = Study(config, variants, range(first, first + num_seeds), out)

    def begin(self) -> None:
        """Checks everything that can be without the data; the definition is written, or found.

        Raises:
            ValueError: naming what was expected; nothing is written then.
        """
        if begin(self._study):
            runs = [is_finished(self._study.folder(*run)) for run in self._study.runs()]
            print(f"{self._study.out}: {sum(runs)} of {len(runs)} runs are finished", flush=True)

    def finish(self, jobs: int, command: Sequence[str], copies: Path | None) -> dict[str, Any]:
        """Trains what is left, and writes ablation.json and report.html.

        Args:
            jobs: Runs at once.
            command: What to write down as the command.
            copies: Folder for copies of both files; None for none.

        Returns:
            Content of ablation.json, and `text`, a table to print.
        """
        study = self._study
        if copies is not None:
            copies.mkdir(parents=True, exist_ok=True)
            check_outputs({f"--results ({name})": copies / name for name in (JSON, PAGE)})
        configs = [study.config(*run) for run in study.runs()]
        left = sum(not is_finished(Path(config.log.run_dir)) for config in configs)
        if left:
            configs = _ready_to_train(study, configs)
        begun = time.monotonic()
        done = 0

        def tell(config: RunConfig) -> None:
            nonlocal done
            done += 1
            gone = time.monotonic() - begun
            print(
                f"{done} of {left} runs ({config.log.run_dir}): {clock_time(gone)} gone, about "
                f"{clock_time(gone / done * (left - done))} left",
                flush=True,
            )

        train_all(configs, jobs, tell)
        runs = load_runs(study)
        content: dict[str, Any] = {
            "name": JSON.partition(".")[0],
            "command": shlex.join(command),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "jobs": jobs,
            "seeds": list(study.seeds),
            "model": Path(study.base.model.path).resolve().name,
            "environment": {
                **environment(),
                "threads": study.base.train.threads or torch.get_num_threads(),
            },
            **results(study, runs),
        }
        means = mean_runs(study, runs)
        _keep_few_samples(means)
        seeds = f"{len(study.seeds)} seed{'' if len(study.seeds) == 1 else 's'}"
        page = ablation_page(content, means, f"spec_rollout: {len(means)} variants, {seeds}")
        text = json.dumps(content, indent=1) + "\n"
        for folder in (study.out, copies):
            if folder is not None:
                write_atomically(folder / JSON, text)
                write_atomically(folder / PAGE, page)
        print(f"report: {study.out / PAGE}", file=sys.stderr)
        return {**content, "text": variants_table(content)}


def _ready_to_train(study: Study, configs: Sequence[RunConfig]) -> list[RunConfig]:
    """The configs, judged after every epoch where they do not say; checks that the runs read what
    the ones before them did.

    Raises:
        DataError, ValueError: naming data or model.
    """
    counts: dict[str, int] = {}
    found = []
    for config in configs:
        is_over = (Path(config.log.run_dir) / SUMMARY).is_file()
        if config.eval.every_steps is not None and not is_over:
            found.append(config)  # nothing to count for
            continue
        key = repr((config.data, config.model, config.rollout.max_model_len, _room(config)))
        if key not in counts:
            counts[key] = _num_prompts(config)
        _check_num_prompts(config, counts[key])
        if config.eval.every_steps is None:
            every = -(-counts[key] // config.train.prompts_per_step)
            config = replace(config, eval=replace(config.eval, every_steps=every))
        found.append(config)
    is_noted = check_inputs(study, inputs_of(configs))
    if not is_noted and any((Path(c.log.run_dir) / CONFIG).is_file() for c in configs):
        print(
            f"note: {study.out / DEFINITION} does not say which rows and weights the runs so far "
            "had, as an older version began it; from now on it names those of today",
            file=sys.stderr,
            flush=True,
        )
    return found


def _room(config: RunConfig) -> int | None:
    """What decides which prompts are too long, beside the model and section `data`."""
    return config.rollout.max_tokens if config.data.long_prompts == "drop" else None


def _num_prompts(config: RunConfig) -> int:
    """Rows that a run trains on."""
    rows = read_data(config)
    if config.data.long_prompts != "drop":
        return len(rows["train"])
    # Which ones are too long, model and tokenizer say.
    model = replace(config.model, device="cpu", attention="eager")
    policy = limited(load_policy(model), config)
    return len(render_data(config, {"train": rows["train"]}, policy)["train"])


def _check_num_prompts(config: RunConfig, num_prompts: int) -> None:
    """ValueError if the run is there, and was trained on fewer or more."""
    folder = Path(config.log.run_dir)
    if not (folder / SUMMARY).is_file():
        return
    before = json.loads((folder / SUMMARY).read_text(encoding="utf-8")).get("num_prompts")
    if before not in (None, num_prompts):
        raise ValueError(
            f"--out: expected the data that {folder} was trained on, {before} prompts, got "
            f"{num_prompts} in {config.data.path!r}; another grid needs another folder"
        )


def _keep_few_samples(runs: Sequence[Any]) -> None:
    """Of some variants that reuse, the responses that say most; none of the others. Those whose
    rule draws against a threshold come first: there is most to see."""
    from spec_rollout.report.tokens import followed

    # Of each run, whether its drafts were drawn against; nothing of a run without drafts.
    drawn = {
        id(run): {bool(s["draft"].get("draws")) for s in run.samples if s.get("draft")}
        for run in runs
    }
    reusing = sorted(
        (run for run in runs if drawn[id(run)]), key=lambda run: True not in drawn[id(run)]
    )
    for run in runs:
        few = followed(run.samples, _NUM_SAMPLES) if run in reusing[:_WITH_SAMPLES] else []
        run.samples = [sample for epochs in few for sample in epochs]
