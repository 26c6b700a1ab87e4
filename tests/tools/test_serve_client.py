"""The client of `vllm serve`, where there is no server."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from bench_runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import serve_client


@pytest.mark.parametrize(
    ("then", "message"), [("exec sleep 60", r"no answer in 0\.1 s"), ("exit 1", "it ended")]
)
def test_waiting_for_a_server_that_never_answers_ends_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, message: str
) -> None:
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(f"#!/bin/sh\necho loading weights\n{then}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    server = serve_client.Server("model", "off", log=log)
    try:
        while not log.read_text():
            time.sleep(0.01)
        seconds = 0.1 if "sleep" in then else 60.0
        with pytest.raises(RuntimeError, match=rf"^vllm serve: {message}\nloading weights"):
            server.wait(seconds)
    finally:
        server.stop()
