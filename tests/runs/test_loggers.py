"""TensorBoard and W&B hold the numbers of metrics.jsonl, and never end a run."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from spec_rollout.config.sections import ConfigError, LogConfig
from spec_rollout.runs import loggers
from spec_rollout.runs.loggers import RunLoggers, check_loggers, numbers_of
from spec_rollout.train.trainer import resume, run

Curves = dict[int, dict[str, float]]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)


def metrics(run_dir: Path) -> Curves:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: numbers_of(row) for row in rows}


def tensorboard_curves(run_dir: Path) -> Curves:
    """As TensorBoard shows them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(run_dir / "tensorboard"), tensor_size_guidance={"scalars": 0}
    ).Reload()
    curves: Curves = {}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            assert tag not in curves.setdefault(event.step, {}), "a step twice"
            (curves[event.step][tag],) = event.tensor_proto.double_val
    return curves


def wandb_records(path: Path):
    """Records of a W&B file: a log in LevelDB's format, each record a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""  # after W&B's own header
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little left in the block for a header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def wandb_curves(path: Path) -> Curves:
    curves: Curves = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: item for item in record.history.item}
            values = {key: json.loads(item.value_json) for key, item in items.items()}
            step = values.pop("_step", record.history.step.num)
            assert step not in curves, "a step twice"
            curves[step] = {k: v for k, v in values.items() if not k.startswith("_")}
    return curves


@pytest.mark.slow
def test_both_hold_the_numbers_of_metrics_jsonl_and_go_on_after_a_stop(make_config) -> None:
    both = {"to": ["tensorboard", "wandb"], "wandb_project": "tiny"}
    config = make_config(
        train={"max_steps": 4},
        eval={"every_steps": 2},
        checkpoint={"every_steps": 2},
        log=both,
    )
    run_dir = Path(config.log.run_dir)

    class PowerCut(BaseException):
        pass

    def cut(step: int, _) -> None:
        if step == 4:
            raise PowerCut

    with pytest.raises(PowerCut):
        run(config, on_rollouts=cut)
    # As if it had been killed: step 3 is done again, and is in the logs already.
    shutil.rmtree(run_dir / "checkpoints" / "step_000003", ignore_errors=True)
    for folder in sorted((run_dir / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    first = wandb_curves(wandb_files(run_dir)[0])
    assert set(first) == {0, 1, 2, 3}
    resume(run_dir)

    wanted = metrics(run_dir)
    assert set(wanted) == {0, 1, 2, 3, 4}
    assert len(wanted[1]) > 40
    assert tensorboard_curves(run_dir) == wanted
    paths = wandb_files(run_dir)
    records = [list(wandb_records(path)) for path in paths]
    runs = [r.run for record in records for r in record if r.WhichOneof("record_type") == "run"]
    assert len({one.run_id for one in runs}) == 1
    assert {one.project for one in runs} == {"tiny"}
    assert runs[0].display_name == "run"
    # The same curves: those of the second part, and before it those of the first.
    second = wandb_curves(paths[-1])
    assert {**first, **second} == wanted
    assert set(second) == {3, 4}


@pytest.mark.slow
def test_a_logger_that_comes_late_gets_the_rows_so_far(make_config) -> None:
    config = make_config(train={"max_steps": 1}, eval={"at_end": False})
    run_dir = Path(config.log.run_dir)
    run(config)
    resume(run_dir, ['log.to=["tensorboard", "wandb"]', "train.max_steps=2"])
    wanted = metrics(run_dir)
    assert set(wanted) == {0, 1, 2}
    assert tensorboard_curves(run_dir) == wanted
    assert wandb_curves(wandb_files(run_dir)[0]) == wanted


def test_numbers_are_all_that_is_finite_but_the_step() -> None:
    row = {
        "step": 3,
        "a": 1,
        "b": 0.1,
        "c": math.nan,
        "d": math.inf,
        "e": None,
        "f": "x",
        "g": True,
    }
    assert numbers_of(row) == {"a": 1, "b": 0.1}


class FullDisk:
    """Takes steps 0 and 3."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed: list[bool] = []

    def log(self, step, values) -> None:
        if 0 < step < 3:
            raise OSError(28, "No space left on device")
        self.steps.append(step)

    def close(self, complete) -> None:
        self.closed.append(complete)
        raise OSError(28, "No space left on device")


def test_a_logger_that_fails_is_told_of_once_and_its_rows_are_counted(
    tmp_path, monkeypatch, capsys
) -> None:
    logger = FullDisk()
    monkeypatch.setattr(loggers, "TensorBoardLogger", lambda *_: logger)

    def no_login(*_):
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(loggers, "WandbLogger", no_login)
    both = RunLoggers(LogConfig(to=("tensorboard", "wandb")), tmp_path, {}, [])
    for step in range(4):
        both.log({"step": step, "x": 1.0})
    both.close(complete=True)
    both.close(complete=False)
    assert logger.steps == [0, 3]
    assert logger.closed == [True]
    assert both.num_unlogged == {"tensorboard": 2, "wandb": 4}
    assert capsys.readouterr().err.splitlines() == [
        "note: log.to: wandb could not be started; training goes on without it "
        "(RuntimeError: no API key configured)",
        "note: log.to: tensorboard did not take step 1; training goes on without it "
        "(OSError: [Errno 28] No space left on device)",
        "note: log.to: tensorboard lacks 2 rows of metrics.jsonl",
        "note: log.to: wandb lacks 4 rows of metrics.jsonl",
    ]


def test_a_run_goes_on_without_its_loggers(make_config, monkeypatch) -> None:
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loggers, "TensorBoardLogger", refuse)
    config = make_config(train={"max_steps": 2}, log={"to": ["tensorboard"]})
    summary = run(config)
    assert summary.num_unlogged_rows == {"tensorboard": 3}
    assert set(metrics(Path(config.log.run_dir))) == {0, 1, 2}
    written = json.loads((Path(config.log.run_dir) / "summary.json").read_text())
    assert written["num_unlogged_rows"] == {"tensorboard": 3}


@pytest.mark.slow
def test_a_disk_that_is_full_does_not_hang_tensorboard(tmp_path) -> None:
    """Its events are written by a thread, whose error comes back with the next call."""
    code = (
        "import resource; from pathlib import Path\n"
        "from spec_rollout.config.sections import LogConfig\n"
        "from spec_rollout.runs.loggers import RunLoggers\n"
        f"loggers = RunLoggers(LogConfig(to=('tensorboard',)), Path({str(tmp_path)!r}), {{}}, [])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "[loggers.log({'step': step, 'x': 1.0}) for step in range(20)]\n"
        "loggers.close(complete=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Not by lines: the thread writes its traceback meanwhile, in pieces.
    notes = re.findall(r"note: .*", done.stderr)
    assert len(notes) == 2, done.stderr
    assert "tensorboard did not take step" in notes[0]
    assert "File too large" in notes[0]
    assert "tensorboard lacks 1" in notes[1]


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_loaded(
    make_config, monkeypatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.to: expected wandb to be installed.*pip install"):
        check_loggers(LogConfig(to=("wandb",)))
    config = make_config(log={"to": ["wandb"]}, model={"path": "nowhere"})
    with pytest.raises(ConfigError, match="wandb"):
        run(config)
    assert not Path(config.log.run_dir).exists()


@pytest.mark.parametrize("to", [["mlflow"], ["wandb", "wandb"], "wandb"])
def test_log_to_is_checked(make_config, to) -> None:
    with pytest.raises(ConfigError, match=r"log\.to"):
        make_config(log={"to": to})
