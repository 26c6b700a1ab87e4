"""Where the commands write: links, pipes and standard output stay what they are, and what cannot be
written is refused before a model is loaded."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from spec_rollout import cli
from spec_rollout.demo import model_dir
from spec_rollout.demo.task import training_problems, write_jsonl


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    path = tmp_path / "prompts.jsonl"
    write_jsonl(training_problems(2), path)
    return ["rollout", "--model", str(model_dir()), "--prompts", str(path), "--max-tokens", "4"]


def test_a_link_stays_and_its_target_gets_the_rollouts(command: list[str], tmp_path: Path) -> None:
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    target.write_text("old\n")
    link.symlink_to(target.name)
    assert cli.main([*command, "--out", str(link)]) == 0
    assert link.is_symlink()
    assert [json.loads(line)["prompt_index"] for line in target.open()] == [0, 1]
    stats = json.loads((tmp_path / "link.stats.json").read_text())
    assert stats["num_rollouts"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "link.jsonl", "link.stats.json", "prompts.jsonl", "target.jsonl",
    ]  # fmt: skip


@pytest.mark.slow
def test_rollouts_go_to_standard_output_and_a_cache_to_a_pipe(
    command: list[str], tmp_path: Path
) -> None:
    pipe, copy = tmp_path / "pipe", tmp_path / "copy"
    os.mkfifo(pipe)
    with subprocess.Popen(["cp", pipe, copy]) as reader:
        options = ["--out", "/dev/stdout", "--cache-out", str(pipe)]
        done = subprocess.run(
            [sys.executable, "-m", "spec_rollout.cli", *command, *options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert reader.returncode == 0
    assert [json.loads(line)["prompt_index"] for line in done.stdout.splitlines()] == [0, 1]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert not Path("/dev/stdout.stats.json").exists()
    again = [*command, "--out", str(tmp_path / "again.jsonl"), "--cache-in", str(copy)]
    assert cli.main([*again, "--pass", "1"]) == 0
    stats = json.loads((tmp_path / "again.stats.json").read_text())
    assert stats["reused_fraction"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{}"], "--out: expected a file, got a folder, {}"),
        (["--out", "{}/x", "--cache-out", "{}"], "--cache-out: expected a file, got a folder, {}"),
        (["--out", "{}/no/x"], "--out: expected a file in an existing folder, got {}/no/x"),
        (["--out", "{}/x", "--cache-out", "{}/x"], "--cache-out: expected a file of its own, got {}/x, which --out writes"),
        (["--out", "{}/x", "--cache-out", "{}/x.stats.json"], "--cache-out: expected a file of its own, got {}/x.stats.json, which --stats writes"),
        (["--out", "{}/prompts.jsonl"], "--out: expected a file of its own, got {}/prompts.jsonl, which --prompts reads"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_at_once(
    command: list[str], tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    command[command.index("--model") + 1] = str(tmp_path / "no model")  # never looked for
    before = sorted(tmp_path.iterdir())
    assert cli.main([*command, *(option.format(tmp_path) for option in options)]) == 2
    assert capsys.readouterr().err == f"error: {message.format(tmp_path)}\n"
    assert sorted(tmp_path.iterdir()) == before


def test_the_report_follows_links_and_refuses_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page, link = tmp_path / "run", tmp_path / "page.html", tmp_path / "link.html"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    link.symlink_to(page)
    assert cli.main(["report", str(run), "--out", str(link)]) == 0
    assert link.is_symlink()
    assert page.read_text().startswith("<!doctype html>")
    capsys.readouterr()
    for out, message in (
        (run, "a file, got a folder"),
        (run / "no" / "x", "a file in an existing"),
    ):
        assert cli.main(["report", str(run), "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith(f"error: --out: expected {message}")
