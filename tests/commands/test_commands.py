"""The commands that load a model, from the command line down, on the demo's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spec_rollout import cli
from spec_rollout.cache import RolloutCache
from spec_rollout.demo import model_dir
from spec_rollout.demo.task import training_problems, write_jsonl


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    write_jsonl(training_problems(3), path)
    return path


def rollout(prompts: Path, name: str, *options: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and statistics of one pass of two samples per prompt."""
    out = prompts.with_name(name)
    argv = ["rollout", "--model", str(model_dir()), "--prompts", str(prompts), "--out", str(out)]
    assert cli.main([*argv, "--num-samples", "2", "--max-tokens", "60", *options]) == 0
    return rows_of(out), json.loads(out.with_suffix(".stats.json").read_text())


def test_a_second_pass_with_the_first_ones_cache_reuses_it(prompts: Path) -> None:
    cache = str(prompts.with_name("cache.bin"))
    first, stats = rollout(prompts, "first.jsonl", "--cache-out", cache)
    assert stats["num_rollouts"] == len(first) == 6
    assert stats["num_reused_tokens"] == 0
    assert [(row["prompt_index"], row["sample"]) for row in first] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    for row in first:
        assert len(row["response_ids"]) == len(row["logprobs"]) <= 60
        assert (row["finish_reason"] == "length") == (len(row["response_ids"]) == 60)
        assert row["prompt"].endswith("=?\n")
    # the same weights and noise: everything is kept, and nothing changes
    second, stats = rollout(prompts, "second.jsonl", "--cache-in", cache, "--pass", "1")
    assert [row["response_ids"] for row in second] == [row["response_ids"] for row in first]
    assert stats["reused_fraction"] == 1.0
    assert all(row["accepted_len"] == len(row["response_ids"]) for row in second)
    # lenient draws new noise each pass, and with equal policies accepts everything
    _, stats = rollout(prompts, "third.jsonl", "--cache-in", cache, "--rule", "lenient")
    assert stats["reused_fraction"] == 1.0
    _, stats = rollout(prompts, "fourth.jsonl", "--cache-in", cache, "--rule", "none")
    assert stats["num_reused_tokens"] == 0


@pytest.mark.slow
def test_the_next_pass_is_taken_and_draws_new_noise(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(prompts.with_name("cache.bin"))
    # Nothing of a draft is accepted, so the noise decides every token.
    options = ["--rule", "lenient", "--log-lenience=-1e9", "--seed", "3", "--temperature", "1.5"]
    first, _ = rollout(prompts, "first.jsonl", *options, "--cache-out", cache)
    passes = [first]
    for name in ("second.jsonl", "third.jsonl"):
        rows, _ = rollout(prompts, name, *options, "--cache-in", cache, "--cache-out", cache)
        passes.append(rows)
    assert "pass 2: 6 rollouts" in capsys.readouterr().err
    responses = [[row["response_ids"] for row in rows] for rows in passes]
    assert len({str(ids) for ids in responses}) == 3
    again, _ = rollout(prompts, "again.jsonl", *options, "--cache-in", cache, "--pass", "2")
    assert "note: --pass 2 is the pass that" in capsys.readouterr().err
    assert [row["response_ids"] for row in again] == responses[2]


@pytest.mark.slow
def test_a_cache_without_a_pass_needs_to_be_told(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = prompts.with_name("cache.bin")
    RolloutCache().save(cache)
    out = prompts.with_name("out.jsonl")
    argv = ["rollout", "--model", str(model_dir()), "--prompts", str(prompts), "--out", str(out)]
    assert cli.main([*argv, "--cache-in", str(cache), "--rule", "lenient"]) == 2
    expected = f"error: --pass: expected the number of this pass, as {cache} does not say"
    assert capsys.readouterr().err.startswith(expected)
    assert not out.exists()
    # Coupled keeps its noise over passes, and a rule that accepts nothing needs no draft.
    for options in (
        ["--rule", "coupled"],
        ["--rule", "none"],
        ["--rule", "lenient", "--pass", "4"],
    ):
        rollout(prompts, "out.jsonl", "--cache-in", str(cache), *options)


def test_columns_are_recognised(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named, _ = rollout(prompts, "named.jsonl")
    capsys.readouterr()
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    questions = [json.dumps({"id": 1, "question": row["prompt"]}) for row in rows]
    prompts.write_text("\n".join(questions) + "\n")
    found, _ = rollout(prompts, "found.jsonl")
    assert [row["response_ids"] for row in found] == [row["response_ids"] for row in named]
    notes = capsys.readouterr().err
    assert "prompts are from column 'question' (--prompt-column names another)" in notes


@pytest.mark.slow
def test_portions_change_nothing(prompts: Path) -> None:
    options = ["--num-samples", "16", "--max-tokens", "4"]
    whole, stats = rollout(prompts, "whole.jsonl", *options)
    one_by_one, portion_stats = rollout(prompts, "portions.jsonl", *options, "--num-slots", "1")
    assert [row["prompt_index"] for row in whole] == [0] * 16 + [1] * 16 + [2] * 16
    ids = ("prompt_index", "sample", "response_ids", "prompt")
    assert [[row[k] for k in ids] for row in one_by_one] == [[row[k] for k in ids] for row in whole]
    assert portion_stats["num_rollouts"] == stats["num_rollouts"] == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-samples", "0"], "--num-samples: expected at least 1, got 0"),
        (["--top-p", "0"], "--top-p: expected 0 < value <= 1, got 0.0"),
        (["--rule", "none", "--log-lenience", "1"], "--log-lenience: expected to be left out"),
        (
            ["--scale", "2"],
            "--scale: expected 1 with rule 'coupled' (only lenient has one), got 2.0",
        ),
        (
            ["--rule", "random_reuse", "--reuse-prob", "2"],
            "--reuse-prob: expected 0 <= value <= 1, got 2.0",
        ),
        (["--pass", "-1"], "--pass: expected >= 0, got -1"),
        (["--cache-in", "nowhere.bin"], "nowhere.bin: No such file"),
        (
            ["--cache-out", "nowhere/cache.bin"],
            "--cache-out: expected a file in an existing folder",
        ),
        (["--prompt-column", "question"], "{prompts}:1: expected a column 'question'"),
        (["--model", "nowhere"], "model.path: expected a folder with config.json"),
        (["--device", "cuda:99"], "model.device: expected a device of this machine"),
    ],
)
def test_rollout_mistakes_are_one_line_and_nothing_is_written(
    prompts: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = prompts.with_name("out.jsonl")
    argv = ["rollout", "--model", str(model_dir()), "--prompts", str(prompts), "--out", str(out)]
    assert cli.main([*argv, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(prompts=prompts)}")
    assert error.count("\n") == 1
    assert [path.name for path in prompts.parent.iterdir()] == ["prompts.jsonl"]


def test_a_damaged_cache_is_refused_and_kept(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = prompts.with_name("cache.bin")
    rollout(prompts, "first.jsonl", "--cache-out", str(cache))
    damaged = cache.read_bytes()[:-5]
    cache.write_bytes(damaged)
    capsys.readouterr()
    out = prompts.with_name("second.jsonl")
    argv = ["rollout", "--model", str(model_dir()), "--prompts", str(prompts), "--out", str(out)]
    assert cli.main([*argv, "--cache-in", str(cache)]) == 2
    assert str(cache) in capsys.readouterr().err
    assert cache.read_bytes() == damaged
    assert not out.exists()


@pytest.mark.slow
def test_train_writes_a_report_and_resumes(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    config = tmp_path / "run.toml"
    config.write_text(
        f'[model]\npath = "{model_dir()}"\n[data]\npath = "{prompts}"\n'
        '[rollout]\nnum_samples = 2\nmax_tokens = 24\n[reward]\nfunctions = ["last_number"]\n'
        "[train]\nprompts_per_step = 3\nmax_steps = 1\nepochs = 4\n"
        f'[eval]\nat_start = false\nat_end = false\n[log]\nrun_dir = "{run_dir}"\n'
    )
    assert cli.main(["train", str(config), "--set", "train.seed=5"]) == 0
    out = capsys.readouterr().out
    assert "seed = 5" in out  # the resolved config
    assert "prompts_per_step = 3" in out
    assert [row["step"] for row in rows_of(run_dir / "metrics.jsonl")] == [1]
    assert "<svg" in (run_dir / "report.html").read_text()
    assert cli.main(["train", str(config)]) == 2
    assert "log.run_dir: expected a new or empty folder" in capsys.readouterr().err
    assert cli.main(["train", str(config), "--resume", "--set", "train.max_steps=2"]) == 0
    assert cli.main(["train", "--resume", str(run_dir), "--set", "train.max_steps=3"]) == 0
    rows = rows_of(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["num_reused_tokens"] > 0
    assert json.loads((run_dir / "summary.json").read_text())["seed"] == 5


def short_demo(folder: Path, *options: str) -> int:
    argv = ["demo", "--short", "--out", str(folder), "--seed", "3", "--threads", "1"]
    return cli.main([*argv, *options])


@pytest.mark.slow
@pytest.mark.usefixtures("even_steps")  # what is proposed depends on what steps take
def test_the_short_demo_compares_three_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert short_demo(tmp_path / "demo") == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["command"] == "spec-rollout demo --short --out demo --seed 3 --threads 1"
    runs = summary["runs"]
    assert list(runs) == ["vanilla", "lenient", "both"]
    assert runs["vanilla"]["reused_fraction"] == runs["vanilla"]["accepted_proposals"] == 0
    assert runs["lenient"]["reused_fraction"] > 0
    assert runs["both"]["reused_fraction"] > 0
    assert runs["both"]["accepted_proposals"] > 0
    assert summary["both_equals_off"] == {"total": 32, "identical": 32, "first_difference": None}
    out = capsys.readouterr().out
    assert "epoch 1 of 2: rollout seconds vanilla" in out
    assert "both and vanilla: 32 of 32 rollouts identical, token for token" in out
    assert out.endswith("make demo-full\n")
    page = (tmp_path / "demo" / "report.html").read_text()
    assert 'class="kept"' in page


@pytest.mark.slow
@pytest.mark.usefixtures("even_steps")
def test_the_full_demo_reports_every_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert short_demo(tmp_path / "demo", "--full") == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert list(summary["runs"]) == ["vanilla", "lenient", "coupled", "both", "coupled_off"]
    for name, run in summary["runs"].items():
        assert run["seed"] == 3
        assert run["steps"] == 4
        assert (run["verification_seconds"] > 0) == (name not in ("vanilla", "coupled_off"))
        assert 0 < run["generated_tokens"] <= run["response_tokens"]
        assert run["accuracy_before"] == summary["runs"]["vanilla"]["accuracy_before"]
        evaluated = set() if name in ("both", "coupled_off") else {"train", "heldout"}
        assert set(run["accuracy_after"]) == evaluated
    runs = summary["runs"]
    assert runs["vanilla"]["effective_speedup"] == 1.0
    assert runs["vanilla"]["reused_fraction"] == runs["coupled_off"]["reused_fraction"] == 0
    assert runs["lenient"]["reused_fraction"] > 0
    assert runs["coupled"]["reused_fraction"] > 0
    assert set(runs["vanilla"]["accuracy_before"]) == {"train", "heldout"}
    assert runs["both"]["reused_fraction"] == runs["coupled"]["reused_fraction"]
    assert runs["both"]["accepted_proposals"] > runs["coupled"]["accepted_proposals"] == 0
    # `both` was not judged: its weights are those of `coupled`, after as many tokens.
    until = {name: run["until_plain_accuracy"] for name, run in runs.items()}
    for name in ("both", "coupled_off"):
        assert (until[name]["rollout_seconds"] is None) == (
            until["coupled"]["rollout_seconds"] is None
        )
    assert until["both"]["generated_tokens"] == until["coupled"]["generated_tokens"]
    assert 0 <= until["vanilla"]["generated_tokens"] <= runs["vanilla"]["generated_tokens"]
    for name in ("coupled", "both"):
        same = summary[f"{name}_equals_off"]
        assert same == {"total": 32, "identical": 32, "first_difference": None}
    out = capsys.readouterr().out
    assert "coupled and the same with the cache off: 32 of 32 rollouts identical" in out
    assert "make demo-full" not in out


@pytest.mark.slow
def test_seeds_have_folders_and_earlier_demos_are_replaced(tmp_path: Path) -> None:
    results = tmp_path / "results" / "demo_seeds.json"
    options = ["--runs", "vanilla", "--seeds", "4,5", "--results", str(results)]
    for _ in range(2):
        assert short_demo(tmp_path / "demo", *options) == 0
    content = json.loads(results.read_text())
    assert content["name"] == "demo_seeds"
    assert [summary["seed"] for summary in content["summaries"]] == [4, 5]
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {"seed-4", "seed-5"}


def test_a_folder_with_other_files_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vanilla").mkdir()
    (tmp_path / "vanilla" / "mine.txt").touch()
    assert short_demo(tmp_path) == 2
    assert "--out: expected a new folder or an earlier demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["vanilla", "mine.txt"]
