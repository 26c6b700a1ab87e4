"""Where a run is resumed: the newest checkpoint that is whole and fits, or a refusal that leaves
the run as it was."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from whole_runs import (
    assert_same_weights,
    final_weights,
    interruption_config,
    read_rows,
    without_seconds,
)

from spec_rollout.config.sections import ConfigError
from spec_rollout.config.toml import load_config
from spec_rollout.report import load_run
from spec_rollout.runs.lock import RunInUseError, RunLock
from spec_rollout.train.checkpoint import CheckpointError, list_checkpoints
from spec_rollout.train.manifest import write_manifest
from spec_rollout.train.trainer import Job, resume, run, run_together

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def kept_run(tmp_path_factory):
    """Folders of a run whose every step has its checkpoint; made once."""
    return {"at": tmp_path_factory.mktemp("kept") / "run"}


@pytest.fixture
def six_steps(make_config, tmp_path, kept_run, one_thread):
    """A copy of such a run of six steps, and what it came to."""
    config = interruption_config(make_config, kept_run["at"], {"every_steps": 1, "keep_last": 9})
    # The data is of this test; the rows are those of every test.
    if not kept_run["at"].exists():
        run(config)
    run_dir = shutil.copytree(kept_run["at"], tmp_path / "run")
    text = (run_dir / "config.toml").read_text()
    old = load_config(run_dir / "config.toml")
    for before, after in ((old.data.path, config.data.path), (old.log.run_dir, str(run_dir))):
        text = text.replace(f'"{before}"', f'"{after}"')
    (run_dir / "config.toml").write_text(text)
    return run_dir, without_seconds(read_rows(run_dir)), final_weights(run_dir)


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def keep_metrics(run_dir: Path, num_steps: int, tail: str = "") -> None:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: num_steps + 1]) + tail)


def snapshot(run_dir: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(run_dir)): path.read_bytes() if path.is_file() else None
        for path in run_dir.rglob("*")
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def lose_a_row(run_dir):
    keep_metrics(run_dir, 5)
    return r"metrics\.jsonl: expected the rows of steps 1 to 6, .* got 5 rows"


def cut_a_row(run_dir):
    keep_metrics(run_dir, 5, '{"step": 6, "rewa')
    return r"metrics\.jsonl: expected the rows of steps 1 to 6, .* got 5 rows"


def flip_weights(run_dir):
    flip(checkpoint(run_dir, 6) / "model" / "model.safetensors")
    return r"model\.safetensors: expected the SHA-256 checksum .*: it is not as it was written"


def flip_moments(run_dir):
    flip(checkpoint(run_dir, 6) / "trainer.pt")
    return r"trainer\.pt: expected the SHA-256 checksum"


def half_remove(run_dir):
    (checkpoint(run_dir, 6) / "cache.bin").unlink()
    return r"expected cache\.bin in it, found none"


def half_write(run_dir):
    (checkpoint(run_dir, 6) / "SHA256SUMS").unlink()
    return r"expected SHA256SUMS in it, found none"


def copy_under_another_name(run_dir):
    shutil.copytree(checkpoint(run_dir, 4), checkpoint(run_dir, 9))
    shutil.rmtree(checkpoint(run_dir, 6))
    return r"step-00000009/state\.json: expected the state of step-00000009, got that of step-0*4"


def change_state(**changes):
    """With checksums that fit: as who edits the file by hand may take care to do."""

    def damage(run_dir):
        folder = checkpoint(run_dir, 6)
        path = folder / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        (folder / "SHA256SUMS").unlink()
        write_manifest(folder)
        return r"state\.json: expected "

    damage.__name__ = "_".join(f"{key}_{value}" for key, value in changes.items())
    return damage


DAMAGES = [
    lose_a_row,
    cut_a_row,
    flip_weights,
    flip_moments,
    half_remove,
    half_write,
    copy_under_another_name,
    change_state(step=1_000_000_000),
    change_state(step=-3),
    change_state(step=9),
]


def notes(capsys):
    """What was said about checkpoints; not that so small a run repeats itself."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "note: " in line and "repeats itself" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_is_taken(six_steps, capsys, damage):
    run_dir, rows, weights = six_steps
    reason = damage(run_dir)
    newest = names(run_dir)[-1]
    capsys.readouterr()
    resume(run_dir)
    (note,) = notes(capsys)
    assert re.search(reason + ".*; the checkpoint before it is taken$", note), note
    assert without_seconds(read_rows(run_dir)) == rows
    assert_same_weights(final_weights(run_dir), weights)
    assert names(run_dir)[-1] == f"unusable-{newest}"


def test_a_huge_step_costs_nothing(six_steps):
    """Renamed and edited so that all but the metrics fit."""
    run_dir, rows, _ = six_steps
    folder = checkpoint(run_dir, 6).rename(checkpoint(run_dir, 10**9))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "step": 10**9}))
    (folder / "SHA256SUMS").unlink()
    write_manifest(folder)
    resume(run_dir)
    assert without_seconds(read_rows(run_dir)) == rows


@pytest.mark.slow
def test_as_many_are_passed_over_as_must_be(six_steps, capsys):
    run_dir, rows, weights = six_steps
    keep_metrics(run_dir, 4)
    flip(checkpoint(run_dir, 4) / "model" / "model.safetensors")
    (run_dir / "checkpoints" / "unusable-step-00000005").mkdir()
    resume(run_dir)
    assert len(notes(capsys)) == 3
    assert without_seconds(read_rows(run_dir)) == rows
    assert_same_weights(final_weights(run_dir), weights)
    assert [name for name in names(run_dir) if "unusable" in name] == [
        "unusable-step-00000004",
        "unusable-step-00000005",
        "unusable-step-00000005-2",
        "unusable-step-00000006",
    ]


def test_if_none_is_left_nothing_is_changed(six_steps):
    run_dir, _, _ = six_steps
    for step in range(6):
        shutil.rmtree(checkpoint(run_dir, step), ignore_errors=True)
    flip_weights(run_dir)
    before = snapshot(run_dir)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected the SHA-256"):
        resume(run_dir)
    assert snapshot(run_dir) == before


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        (
            "train.prompts_per_step=2",
            CheckpointError,
            r"train\.prompts_per_step: expected 3, as in the run so far .*, got 2",
        ),
        ("train.seed=8", CheckpointError, r"train\.seed: expected 7, as in .*, got 8"),
        ("data.shuffle=false", CheckpointError, r"data\.shuffle: expected True, .*, got False"),
        ("data.max_rows=5", CheckpointError, r"data\.path: expected the prompts that"),
        ("rollout.num_samples=1", ConfigError, r"rollout\.num_samples: expected at least 2"),
        ("model.dtype=bfloat16", CheckpointError, r"trainer\.pt: .* expected torch\.bfloat16"),
        ("train.lr=-1", ConfigError, r"train\.lr: expected a finite number >= 0"),
        ("train.algorithm=ppoo", ConfigError, r"train\.algorithm: expected one of"),
        ("rollout.max_tokens=4000", ValueError, r"expected prompt and response to fit"),
        ("rollout.num_slot=4", ConfigError, r"rollout\.num_slot: unknown key"),
        ("reward.functions=['absent:f']", ConfigError, r"reward\.functions: cannot load"),
        ("log.run_dir=elsewhere", ConfigError, r"log\.run_dir: expected '.*', where the resumed"),
    ],
)
def test_what_is_refused_is_not_kept(six_steps, override, error, message):
    run_dir, _, _ = six_steps
    before = snapshot(run_dir)
    with pytest.raises(error, match=message):
        resume(run_dir, [override, "train.max_steps=7", "train.epochs=none"])
    assert snapshot(run_dir) == before
    assert resume(run_dir).totals.steps == 6


def test_the_policy_version_goes_on(six_steps):
    run_dir, _, _ = six_steps
    shutil.rmtree(checkpoint(run_dir, 6))
    shutil.rmtree(checkpoint(run_dir, 5))
    versions = {}
    resume(
        run_dir,
        ["train.max_steps=8", "train.epochs=none"],
        on_rollouts=lambda step, rollouts: versions.update({step: rollouts.policy_version}),
    )
    assert versions == {5: 4, 6: 5, 7: 6, 8: 7}


@pytest.mark.slow
def test_another_rule_does_without_what_it_cannot_read(make_config, tmp_path, capsys):
    """A rule that reads log-probs takes over from one that keeps none."""
    config = make_config(rollout={"rule": "coupled"}, train={"epochs": None, "max_steps": 2})
    run(config)
    capsys.readouterr()
    resume(config.log.run_dir, ["rollout.rule=lenient", "train.max_steps=6"])
    assert "note: rollout.rule: the rollouts so far were kept without" in capsys.readouterr().err
    rows = read_rows(config.log.run_dir)
    assert [row["num_drafts"] for row in rows[1:]] == [0, 0, 0, 0, 12, 12]


def test_a_cache_file_without_what_the_rule_reads_is_refused(make_config, tmp_path):
    first = make_config(rollout={"rule": "coupled"}, train={"max_steps": 1})
    run(first)
    cache = list_checkpoints(Path(first.log.run_dir) / "checkpoints")[-1] / "cache.bin"
    second = make_config(
        rollout={"rule": "lenient", "cache_path": str(cache)},
        log={"run_dir": str(tmp_path / "second")},
    )
    with pytest.raises(
        ConfigError, match=r"rollout\.cache_path: expected rollouts with log-probs, .* 'lenient'"
    ):
        run(second)
    assert not (tmp_path / "second").exists()


@pytest.mark.slow
def test_other_heldout_prompts_are_said(make_config, write_rows, capsys):
    first = write_rows([{"prompt": "2 2 =?\n", "answer": "4"}], "a.jsonl")
    second = write_rows([{"prompt": "2 3 =?\n", "answer": "5"}], "b.jsonl")
    config = make_config(train={"max_steps": 1}, eval={"path": str(first)})
    run(config)
    capsys.readouterr()
    resume(config.log.run_dir, ["train.max_steps=2"])
    assert notes(capsys) == []
    resume(config.log.run_dir, ["train.max_steps=3", f"eval.path={second}"])
    (note,) = notes(capsys)
    assert "has other held-out prompts than the run had so far" in note


# ---- one process at a time


def test_a_run_that_is_worked_on_is_left_alone(six_steps):
    run_dir, _, _ = six_steps
    lock = RunLock(run_dir, "resume")
    before = snapshot(run_dir)
    with pytest.raises(RunInUseError, match=r"resume: expected a run that no process works on"):
        resume(run_dir, ["train.max_steps=9", "train.epochs=none"])
    assert snapshot(run_dir) == before
    assert len(load_run(run_dir).metrics) == 7  # who only reads needs no lock
    lock.release()
    resume(run_dir)
    assert not (run_dir / "run.lock").exists()


def test_a_run_holds_its_lock_to_the_end(make_config, tmp_path):
    config = make_config(train={"max_steps": 2})
    refused = []

    def on_step(row):
        with pytest.raises(RunInUseError) as caught:
            resume(config.log.run_dir)
        refused.append(str(caught.value))

    run(config, on_step=on_step)
    assert len(refused) == 3
    assert resume(config.log.run_dir).totals.steps == 2


def test_two_runs_in_one_folder_are_refused(make_config):
    config = make_config(train={"max_steps": 1})
    with pytest.raises(RunInUseError, match=r"log\.run_dir: expected a run that no process"):
        run_together([Job(config), Job(config)])
    assert run(config).totals.steps == 1


@pytest.mark.slow
def test_two_resumes_half_a_second_apart(six_steps):
    """One goes on, the other says who does; the run is what it would have been."""
    run_dir, rows, weights = six_steps
    for step in (2, 3, 4, 5, 6):
        shutil.rmtree(checkpoint(run_dir, step))
    command = [
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, sys.argv[1]); from spec_rollout.cli import main; "
        "sys.exit(main(sys.argv[2:]))",
        str(Path(__file__).parents[1]),
        "train",
        "--resume",
        str(run_dir),
    ]
    first, second = (subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2))
    ends = [(process, process.communicate(timeout=300)[1]) for process in (first, second)]
    codes = sorted(process.returncode for process, _ in ends)
    errors = [err for process, err in ends if process.returncode]
    assert codes in ([0, 0], [0, 2])  # the second may have come when the first was done
    for err in errors:
        assert "error: resume: expected a run that no process works on" in err
    assert without_seconds(read_rows(run_dir)) == rows
    assert_same_weights(final_weights(run_dir), weights)


# ---- before there is a checkpoint


@pytest.mark.slow
def test_a_run_killed_early_begins_again(make_config, tmp_path, uninterrupted, capsys):
    rows, weights, _ = uninterrupted
    config = interruption_config(make_config, tmp_path / "killed")
    run(config)
    run_dir = Path(config.log.run_dir)
    # As a killed process leaves it.
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "summary.json").unlink()
    keep_metrics(run_dir, 2, '{"step"')
    (run_dir / "checkpoints" / ".tmp-step-00000002").mkdir(parents=True)
    capsys.readouterr()
    resume(run_dir)
    assert "there is no checkpoint yet; the run begins again" in capsys.readouterr().err
    assert without_seconds(read_rows(run_dir)) == without_seconds(rows)
    assert_same_weights(final_weights(run_dir), weights)


def test_a_finished_run_without_checkpoints_is_not_begun_again(make_config):
    config = make_config(train={"max_steps": 1}, checkpoint={"at_end": False})
    run(config)
    before = snapshot(Path(config.log.run_dir))
    with pytest.raises(CheckpointError, match=r"resume: expected a run with a checkpoint"):
        resume(config.log.run_dir, ["train.max_steps=2"])
    assert snapshot(Path(config.log.run_dir)) == before


def test_weights_stored_without_being_numbers_are_refused(make_config, model_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_dir, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[2]
    weights[name].view(-1)[:2] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = make_config(model={"path": str(folder)})
    with pytest.raises(
        ConfigError, match=rf"model\.path: expected finite weights, got infinity in {name} \(2 of"
    ):
        run(config)
    assert not Path(config.log.run_dir).exists()
