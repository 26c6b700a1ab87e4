"""Run files: rows survive a crash, nothing is written over."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from spec_rollout.config.sections import ConfigError
from spec_rollout.runs.files import JsonLines, check_new_run_dir, write_atomically


def test_rows_are_in_the_file_at_once(tmp_path):
    log = JsonLines(tmp_path / "m.jsonl", keep_through=0)
    log.write({"step": 1, "text": "ü\n", "loss": float("nan")})
    row = json.loads((tmp_path / "m.jsonl").read_text())
    assert row == {"step": 1, "text": "ü\n", "loss": None}
    log.close()


def test_later_rows_and_a_cut_off_line_go(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(5)) + '{"step": 5, "rew')
    log = JsonLines(path, keep_through=3, keep_rows=True)
    log.write({"step": 4, "again": True})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == log.rows == [{"step": s} for s in range(4)] + [{"step": 4, "again": True}]


def test_rows_are_not_kept_in_memory(tmp_path):
    path = tmp_path / "samples.jsonl"
    tracemalloc.start()
    try:
        log = JsonLines(path, keep_through=0)
        for step in range(40):
            log.write({"step": step, "text": f"{step}" * 500_000})
        log.close()
        log = JsonLines(path, keep_through=19)  # as a resumed run
        log.close()
        assert log.rows == []
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 14e6
    assert [json.loads(line)["step"] for line in path.open()] == list(range(20))


def test_a_cut_off_line_alone_goes(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    log = JsonLines(path, keep_through=9)
    log.close()
    assert path.read_text() == '{"step": 1}\n'


def test_atomic_write_replaces_whole(tmp_path):
    path = tmp_path / "s.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_run_dirs(tmp_path):
    check_new_run_dir(tmp_path / "absent")
    check_new_run_dir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"log\.run_dir: expected a new or empty folder, got .* with file"
    ):
        check_new_run_dir(tmp_path)
    with pytest.raises(ConfigError, match=r"log\.run_dir: expected a folder, got the file"):
        check_new_run_dir(tmp_path / "file")
