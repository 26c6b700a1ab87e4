"""Engines share finished rollouts by a folder, off their steps: all without vLLM."""

from __future__ import annotations

import gc
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spec_rollout.drafting import Drafter, HistoryFolder, HistoryIdentity, MatchShares, Payoff
from spec_rollout.engines.vllm.worker import sharing as module
from spec_rollout.engines.vllm.worker.engine_history import EngineHistory
from spec_rollout.engines.vllm.worker.sharing import HistorySharing
from spec_rollout.keys import prompt_key

IDENTITY = HistoryIdentity("toy", "kind", 1000, "")
MOST = 1 << 22
PROMPT = prompt_key([1])


def sharing(path: Path, log: list[str] | None = None) -> HistorySharing:
    write = (lambda line: None) if log is None else log.append
    made = HistorySharing.in_folder(str(path), IDENTITY, MOST, write)
    made._poll_seconds = 0.01
    return made


def engine(shared: HistorySharing | None) -> EngineHistory:
    return EngineHistory(
        1 << 22, Payoff(), MatchShares(), max_proposal=8, token_budget=64, sharing=shared
    )


def finish(history: EngineHistory, tokens: list[int], tag: int | None = None) -> None:
    """A request that is given these tokens and is over."""
    slot = history.join(PROMPT, [], tag)
    if tokens:
        handles = history._handles(np.array([slot]))
        logprobs = np.full(len(tokens), -0.25, np.float32)
        ids = np.array(tokens, np.int32)
        history._drafter.extend(handles, ids, np.array([ids.size]), logprobs)
    history.leave(slot)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def received(history: EngineHistory, count: int) -> None:
    def is_there() -> bool:
        history.receive()
        return history.info()["num_received"] >= count

    until(is_there)
    assert history.info()["num_received"] == count


def test_what_one_engine_finished_the_others_remember(tmp_path: Path) -> None:
    one, other = (engine(sharing(tmp_path)) for _ in range(2))
    finish(one, [1, 2, 3], tag=5)
    finish(one, [])
    finish(one, [1, 4])
    received(other, 2)
    found = other.recall(PROMPT, 5)
    assert found is not None
    assert found[0].tolist() == [1, 2, 3]
    assert found[1].tolist() == [-0.25] * 3
    assert other.info()["num_sequences"] == 2
    finish(other, [7, 8], tag=5)
    received(one, 1)
    assert one.recall(PROMPT, 5)[0].tolist() == [7, 8]  # type: ignore[index]
    for history, number in ((one, 2), (other, 1)):
        until(lambda history=history, number=number: history.info()["num_shared"] == number)
        assert history.info()["num_share_errors"] == history.info()["num_unshared"] == 0
    # Who starts later knows it from the start, and one that forgets is not told again.
    late = engine(sharing(tmp_path))
    assert late.info()["num_received"] == late.info()["num_sequences"] == 3
    late.clear()
    finish(one, [9])
    received(late, 4)
    assert late.info()["num_sequences"] == 1
    assert "num_shared" not in engine(None).info()


def test_a_step_takes_in_so_much_and_no_more(tmp_path: Path) -> None:
    one, other = engine(sharing(tmp_path)), engine(sharing(tmp_path))
    count = 8
    for number in range(count):
        finish(one, [number] * (module._STEP_TOKENS // 2 + 1))
    until(lambda: one.info()["num_shared"] == count)
    mail = other._sharing._mail  # type: ignore[union-attr]
    until(lambda: mail._received_tokens == count * (module._STEP_TOKENS // 2 + 1))
    for step in range(1, count // 2 + 1):
        other.receive()
        assert other.info()["num_received"] == 2 * step


def test_a_folder_that_fails_is_said_once_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    one = engine(sharing(tmp_path / "folder", log))
    finish(one, [1])
    until(lambda: one.info()["num_shared"] == 1)
    shutil.rmtree(tmp_path / "folder")
    for number in range(3):
        finish(one, [number])
        until(lambda number=number: one.info()["num_unshared"] == number + 1)
    until(lambda: one.info()["num_share_errors"] > 3)
    assert len(log) == 1
    assert "not shared as they should be" in log[0]
    assert "folder" in log[0]
    assert one.info()["num_sequences"] == 4
    # A folder that cannot be had from the start.
    (tmp_path / "file").touch()
    never = engine(sharing(tmp_path / "file" / "inside", log))
    finish(never, [1])
    never.receive()
    assert never.info()["num_unshared"] == never.info()["num_share_errors"] == 1
    assert len(log) == 2
    # One that does not say any more whose rollouts it has, as after a power cut.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "identity.json").touch()
    unknown = engine(sharing(tmp_path / "new", log))
    finish(unknown, [1])
    assert unknown.info()["num_unshared"] == unknown.info()["num_share_errors"] == 1
    assert "remove the folder to begin anew" in log[2]
    (tmp_path / "new" / "identity.json").unlink()
    # Whatever goes wrong there.
    other = engine(sharing(tmp_path / "new", log))
    monkeypatch.setattr(HistoryFolder, "append", lambda self, rows: 1 / 0)
    finish(other, [1])
    until(lambda: other.info()["num_unshared"] == 1)
    assert "division" in log[3]


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = sharing(tmp_path)
    shared._poll_seconds = 1000.0
    one = engine(shared)
    monkeypatch.setattr(module, "_MOST_WAITING_BYTES", 8 * 100)
    for _ in range(5):
        finish(one, [1] * 30)
    assert one.info()["num_unshared"] == 2
    assert one.info()["num_sequences"] == 5
    # Nothing is read that there is no room for.
    mail = module._Mail(lambda line: None)
    writer, reader = (HistoryFolder(tmp_path, IDENTITY, MOST) for _ in range(2))
    for _ in range(2):
        writer.append(module._rows_of([(PROMPT, 0, np.ones(60, np.int32), np.zeros(60))] * 2))
        module._read(reader, mail)
        assert mail._received_tokens == 120
    mail.take()
    module._read(reader, mail)
    assert mail._received_tokens == 120


def test_an_engine_that_is_dropped_writes_what_it_had_and_ends_its_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    shared = sharing(tmp_path)
    shared._poll_seconds = 1000.0
    one = engine(shared)
    assert threading.active_count() == before + 1
    finish(one, [1, 2])
    del one, shared
    gc.collect()
    assert threading.active_count() == before
    drafter = Drafter()
    for rows in HistoryFolder(tmp_path, IDENTITY, MOST).read():
        drafter.add_rows(rows)
    assert drafter.info().num_sequences == 1


def test_another_models_folder_is_refused(tmp_path: Path) -> None:
    HistoryFolder(tmp_path, HistoryIdentity("another", "kind", 999, ""), MOST)
    with pytest.raises(ValueError, match=r"expected rollouts of toy .* holds those of another"):
        sharing(tmp_path)
