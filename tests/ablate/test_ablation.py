"""A grid with the real engine: ended and gone on with, and what it says."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from spec_rollout import cli
from spec_rollout.ablate import run as ablate_run
from spec_rollout.ablate import workers
from spec_rollout.ablate.page import ablation_page
from spec_rollout.ablate.progress import _before
from spec_rollout.ablate.results import mean_runs, results
from spec_rollout.ablate.run import Ablation
from spec_rollout.ablate.study import Study
from spec_rollout.ablate.table import variants_table
from spec_rollout.ablate.variants import variants
from spec_rollout.config.sections import ConfigError, RunConfig
from spec_rollout.config.toml import dump_config
from spec_rollout.runs.load import Run, load_run

VARIANTS = variants("0.5,inf", also=["both: rule=coupled, drafting=true"])


def grid(config: RunConfig, out: Path, found: Any = VARIANTS, seeds: int = 2) -> Ablation:
    return Ablation(config, found, seeds, out)


def finish(ablation: Ablation, copies: Path | None = None, jobs: int = 1) -> dict[str, Any]:
    ablation.begin()
    return ablation.finish(jobs, ["spec-rollout", "ablate", "x"], copies)


@pytest.mark.slow
def test_a_grid_goes_on_where_it_was_and_says_what_was_found(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = make_config(train={"epochs": 2, "lr": 1e-2}), tmp_path / "grid"
    trained: list[str] = []
    real = workers.train_one

    def fails_at_the_fourth(run: RunConfig) -> None:
        trained.append(Path(run.log.run_dir).name)
        if len(trained) == 4:
            raise KeyboardInterrupt
        real(run)

    monkeypatch.setattr(workers, "train_one", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        finish(grid(config, out))
    assert trained == ["plain", "lenient_0.5", "lenient_inf", "both"]
    kept = (out / "seed-7" / "plain" / "metrics.jsonl").stat().st_mtime_ns

    content = finish(grid(config, out), tmp_path / "copies")
    assert trained[4:] == ["both", *VARIANTS]
    assert (out / "seed-7" / "plain" / "metrics.jsonl").stat().st_mtime_ns == kept
    assert not list(out.glob("*/*/responses"))
    assert content.pop("text").count("\n") == 4
    for name in ("ablation.json", "report.html"):
        assert (out / name).read_bytes() == (tmp_path / "copies" / name).read_bytes()
    text = (out / "ablation.json").read_text()
    assert not any(word in text for word in ("NaN", "Infinity"))
    saved = json.loads(text)
    assert saved == json.loads(json.dumps(content))
    check_facts(saved, out)
    page = (out / "report.html").read_text()
    assert "not shown" not in page
    for text in ("published: speed-up", "Against log_lenience", "Overlap with the epoch before"):
        assert text in page

    for other, message in (
        (grid(config, out, seeds=3), r"--out: .*seeds = \[7, 8, 9\] instead of \[7, 8\]"),
        (grid(make_config(train={"epochs": 3}), out), r"base\.train\.epochs = 3 instead of 2"),
        (grid(config, out, variants("0.5,inf")), r"variants\.both\..* = 'left out'"),
    ):
        with pytest.raises(ValueError, match=message):
            other.begin()


def check_facts(saved: dict[str, Any], out: Path) -> None:
    """Against the rows that the runs themselves wrote."""
    assert list(saved["variants"]) == list(VARIANTS)
    rows = {
        name: [load_run(out / f"seed-{seed}" / name).metrics for seed in (7, 8)]
        for name in VARIANTS
    }

    def total(name: str, index: int, key: str, first_epoch: int = 0) -> float:
        return sum(
            row[key] for row in rows[name][index] if row["step"] and row["epoch"] >= first_epoch
        )

    tokens = "num_generated_tokens"
    for name, variant in saved["variants"].items():
        shares = [total(name, i, tokens) / total("plain", i, tokens) for i in (0, 1)]
        assert variant["mean"]["token_share"] == pytest.approx(sum(shares) / 2, rel=1e-4)
        assert variant["sd"]["token_share"] == pytest.approx(
            abs(shares[0] - shares[1]) / math.sqrt(2), rel=1e-4, abs=1e-6
        )
        for index, facts in enumerate(variant["runs"]):
            assert facts["seed"] == 7 + index
            seconds = [total(n, index, "rollout_seconds", 1) for n in ("plain", name)]
            assert facts["effective_speedup"] == pytest.approx(seconds[0] / seconds[1], rel=1e-4)
            last = rows[name][index][-1]
            assert facts["accuracy"] == pytest.approx(last["accuracy_train"], abs=1e-6)
            # All variants of a seed were judged once before training.
            first = rows["plain"][index][0]
            assert facts["accuracy_before"]["train"] == first["accuracy_train"]
        # Judged before training, and after each epoch of two steps.
        assert [point[0] for point in variant["curve"]] == [0, 2, 4]
        assert len(variant["by_epoch"]["entropy"]) == 2
    # Full reuse generates nothing after the first epoch; its responses are those of before.
    full = saved["variants"]["lenient_inf"]
    assert full["by_epoch"]["epoch_overlap"] == [None, 1.0]
    assert full["mean"]["token_share"] == pytest.approx(0.5, abs=0.1)
    assert full["mean"]["later_new_per_prompt"] == 0.0
    assert full["changes"]["rollout.log_lenience"] == "inf"
    assert full["published"]["speedup"] == 14.86
    assert saved["variants"]["plain"]["mean"]["effective_speedup"] == 1.0
    reached = saved["variants"]["plain"]["until_plain_accuracy"]["generated_tokens"]
    assert reached <= sum(total("plain", i, tokens) for i in (0, 1)) / 2 * 1.0001


def test_a_variant_that_does_not_fit_is_named_before_anything_is_written(
    make_config, tmp_path: Path
) -> None:
    out = tmp_path / "grid"
    wrong = variants(also=["x: rule=coupled, fresh_share=0.5"])
    with pytest.raises(ConfigError, match=r"x: rollout\.fresh_share: expected 0 with the rule"):
        grid(make_config(), out, wrong).begin()
    assert not out.exists()
    (out / "seed-0").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--out: expected a new folder"):
        grid(make_config(), out).begin()


@pytest.mark.slow
def test_runs_side_by_side_are_the_runs_one_after_the_other(make_config, tmp_path: Path) -> None:
    config = make_config(train={"epochs": 2, "threads": 1})
    contents = [finish(grid(config, tmp_path / str(jobs), seeds=1), jobs=jobs) for jobs in (1, 2)]
    for name in VARIANTS:
        one, two = (content["variants"][name]["mean"] for content in contents)
        for key in ("generated_tokens", "accuracy", "later_entropy"):
            assert one.get(key) == two.get(key)
    # What fails in a worker is named with its run, and can be gone on with.
    broken = make_config(train={"epochs": 2}, model={"path": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"seed-7/\w+.*: ConfigError: model\.path"):
        finish(grid(broken, tmp_path / "broken", seeds=1), jobs=2)


def test_the_command_trains_as_many_at_once_as_it_is_told(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def finish(self: Ablation, jobs: int, *_: object) -> dict[str, str]:
        told.append(jobs)
        return {"text": "the table"}

    monkeypatch.setattr(Ablation, "begin", lambda self: None)
    monkeypatch.setattr(Ablation, "finish", finish)
    path = tmp_path / "c.toml"
    path.write_text(dump_config(make_config()))
    argv = ["ablate", str(path), "--lenience", "0", "--out", str(tmp_path / "grid")]
    assert cli.main(argv) == cli.main([*argv, "--jobs", "3"]) == 0
    assert told == [1, 3]


class Stopped(Exception):
    """Before anything is trained."""


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Those that would have been trained last."""
    found: list[RunConfig] = []

    def train_all(configs: list[RunConfig], *_: object) -> None:
        found[:] = configs
        raise Stopped

    monkeypatch.setattr(ablate_run, "train_all", train_all)
    return found


def test_a_grid_goes_on_with_the_rows_and_the_weights_that_it_was_begun_with(
    make_config, model_dir: Path, tmp_path: Path, write_rows, configs: list[RunConfig]
) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    config, out = make_config(model={"path": str(model)}), tmp_path / "grid"

    def goes_on() -> None:
        with pytest.raises(Stopped):
            finish(grid(config, out))

    goes_on()
    goes_on()
    rows = Path(config.data.path).read_text()
    Path(config.data.path).write_text(rows.replace('"answer": "3"', '"answer": "4"'))
    with pytest.raises(ValueError, match=r"expected the rows that the grid in .*train\.jsonl'"):
        finish(grid(config, out))
    Path(config.data.path).write_text(rows)
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"expected the model that the grid in .*model' \(finger"):
        finish(grid(config, out))
    weights.write_bytes(kept)
    (model / "README.md").write_text("of no weight")
    goes_on()


def test_a_grid_that_does_not_say_what_its_runs_read_goes_on_with_a_note(
    make_config, tmp_path: Path, configs: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = make_config(), tmp_path / "grid"
    ablation = grid(config, out)
    ablation.begin()  # as an older version left it
    plain = out / "seed-7" / "plain"
    plain.mkdir(parents=True)
    (plain / "config.toml").write_text(dump_config(config))
    (plain / "summary.json").write_text('{"num_prompts": 5}')
    expected = r"expected the data that .*plain was .*, 5 prompts, got 6"
    with pytest.raises(ValueError, match=expected):
        finish(ablation)
    (plain / "summary.json").write_text('{"num_prompts": 6}')
    for num_notes in (1, 0):
        with pytest.raises(Stopped):
            finish(ablation)
        note = "grid.toml does not say which rows and weights the runs so far"
        assert capsys.readouterr().err.count(note) == num_notes


def test_runs_are_judged_after_each_epoch_of_the_prompts_that_are_left(
    make_config, tmp_path: Path, write_rows, configs: list[RunConfig]
) -> None:
    rows = [{"prompt": f"{i} 1 =?\n", "answer": str(i + 1)} for i in range(6)]
    rows += [{"prompt": f"{i} +1" * 5 + " =?\n", "answer": "1"} for i in range(2)]
    config = make_config(data={"max_prompt_tokens": 12, "long_prompts": "drop"})
    write_rows(rows, "train.jsonl")
    found = variants("0.5", also=["small: train.prompts_per_step=2", "often: eval.every_steps=1"])
    with pytest.raises(Stopped):
        finish(grid(config, tmp_path / "grid", found, seeds=1))
    assert [config.eval.every_steps for config in configs] == [2, 2, 3, 1]


def rows_without_a_judgement(name: str) -> list[dict[str, Any]]:
    """One epoch; nothing was judged in its last evaluation."""
    step = {"epoch": 0, "reward": None, "rollout_seconds": 1.0, "step_seconds": 2.0}
    rows = [{"step": i, **step, "num_generated_tokens": 10, "num_new_responses": 4} for i in (1, 2)]
    rows[0]["accuracy_train"], rows[1]["accuracy_train"] = 0.5, None
    return [*([{"step": 0, "epoch": 0, "accuracy_train": None}] if name == "plain" else []), *rows]


def test_a_grid_without_a_second_epoch_and_without_judgements(make_config, tmp_path: Path) -> None:
    study = Study(make_config(), variants("0.5"), [7, 8], tmp_path)
    runs = {
        run: Run(run[1], rows_without_a_judgement(run[1]), {"num_prompts": 4})
        for run in study.runs()
    }
    # Of one seed the responses before training were judged.
    runs[8, "plain"].metrics[0]["accuracy_train"] = 0.25
    content = results(study, runs)
    for variant in content["variants"].values():
        assert "accuracy" not in variant["mean"]
        assert [point[0] for point in variant["curve"]] == [1]
    assert content["variants"]["plain"]["runs"][1]["accuracy_before"] == {"train": 0.25}
    means = mean_runs(study, runs)
    assert means[0].summary["accuracy_before"] == {}
    content["text"] = variants_table(content)
    head, *lines = content["text"].splitlines()
    assert head.split()[:4] == ["tokens", "speed-up", "step", "accuracy"]
    assert [line.split()[:5] for line in lines] == [
        ["plain", "100%", "-", "-", "-"],
        ["lenient_0.5", "100%", "-", "-", "-"],
    ]
    assert "not shown" not in ablation_page(content, means, "a grid")
    nothing = _before({"step": 0, "accuracy_train": math.nan})
    assert nothing == "accuracy before training: no response was judged"


def test_runs_that_would_share_a_store_are_refused_before_one_is_trained(
    make_config, tmp_path: Path
) -> None:
    out = tmp_path / "grid"
    for store, message in (
        ({"cache_store": "disk", "cache_folder": "store"}, r"folder: expected to be left out, so"),
        ({"cache_store": "ray", "cache_ray": "a/b"}, r"ray: expected a pool of actors for each"),
    ):
        with pytest.raises(ConfigError, match=r"lenient_0\.5: rollout\.cache_" + message):
            grid(make_config(rollout=store), out).begin()
    assert not out.exists()
    grid(make_config(rollout={"cache_store": "disk", "cache_folder": None}), out).begin()
