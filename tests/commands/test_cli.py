from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from spec_rollout import cli


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error line of a command that must fail as a user's mistake does."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "COMMAND: expected one of train, rollout, ablate, eval, report, demo, vllm-args, cache, doctor, got trian; did you mean train?"),
        (["train", "--lr", "1"], "unrecognized arguments: --lr"),
        (["report"], "the following arguments are required: RUNDIR"),
        (["rollout", "--rule", "copled"], "--rule: expected one of lenient, coupled, one_hot, random_reuse, random_cut, none, got copled; did you mean coupled?"),
        (["rollout", "--num-samples", "x"], "argument --num-samples: invalid int value: 'x'"),
        (["train"], "train: expected CONFIG.toml or --resume RUNDIR, got neither"),
        (["train", "a.toml", "--resume", "runs/x"], "train: expected CONFIG.toml or --resume RUNDIR, got both"),
        (["demo", "--runs", "vanila"], "--runs: expected names out of vanilla, lenient, both, got 'vanila'"),
        (["demo", "--full", "--runs", "vanila"], "--runs: expected names out of vanilla, lenient, coupled, both, coupled_off, got 'vanila'"),
        (["demo", "--epochs", "1"], "--epochs: expected at least 2"),
        (["demo", "--seeds", "0,x"], "--seeds: expected integers with commas, got '0,x'"),
        (["ablate", "demo"], "ablate: expected --lenience, --baselines or --also, got none of them"),
        (["ablate", "demo", "--lenience", "0,x"], "--lenience: expected numbers with commas, got 'x'"),
        (["ablate", "demo", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["ablate", "demo", "--lenience", "0", "--set", "train.lrr=1"], "train.lrr: unknown key; did you mean train.lr?"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert fails(capsys, *argv).startswith(message)


def test_mistakes_in_files_are_one_line_that_names_the_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "nowhere.toml" in fails(capsys, "train", str(tmp_path / "nowhere.toml"))
    config = tmp_path / "run.toml"
    config.write_text('[model]\npath = "m"\n[data]\npath = "d"\n[train]\nlearning_rate = 1\n')
    assert "train.learning_rate: unknown key" in fails(capsys, "train", str(config))
    assert "--set: expected section.key=value" in fails(
        capsys, "train", str(config), "--set", "lr=1"
    )
    assert "expected an existing directory" in fails(capsys, "report", str(tmp_path / "nowhere"))
    assert fails(capsys, "train", "--resume", str(tmp_path / "nowhere")).startswith("resume: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.toml"]


def test_help_and_version_cost_no_import_of_torch() -> None:
    program = (
        "import sys; from spec_rollout.cli import main\n"
        "try: main(['rollout', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert main(['--version']) == 0\n"
        "loaded = {'torch', 'numpy', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--cache-in FILE" in result.stdout


def test_debug_shows_where_an_error_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPEC_ROLLOUT_DEBUG", "1")
    with pytest.raises(ValueError, match="expected an existing directory"):
        cli.main(["report", str(tmp_path / "nowhere")])


def test_an_unforeseen_error_names_its_type_and_the_switch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(as_json: bool) -> int:
        return {}["x"]

    monkeypatch.setattr("spec_rollout.commands.doctor.main", broken)
    assert fails(capsys, "doctor") == "KeyError: 'x' (SPEC_ROLLOUT_DEBUG=1 shows where)"


def test_a_missing_extra_names_the_package_and_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("spec_rollout.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = fails(capsys, "report", str(tmp_path))
    assert message == "matplotlib is not installed: pip install 'matplotlib>=3.8'"


def test_report_is_written_into_the_first_run_or_where_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        row = {"step": 1, "reward": 0.5, "rollout_seconds": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'report.html'}\n"
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "both.html")]) == 0
    one, both = tmp_path / "a" / "report.html", tmp_path / "both.html"
    assert "<th>a</th><th>b</th>" in one.read_text()
    assert "<th>a</th><th>b</th>" in both.read_text()
