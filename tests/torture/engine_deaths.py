"""vLLM's engine in a process of its own, killed in mid-rollout.

The step fails, by an error that says that the engine is dead; what was stored is as it was before
it; and the same step with a new engine gives what it gives undisturbed. Runs in the environment
that has vLLM, as a script, so that `make torture` may be in another:

    .venv-vllm/bin/python tests/torture/engine_deaths.py 4 0
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# A dead engine is noticed, not waited for.
_MOST_SECONDS = 60.0


def kill_engines(times: int, seed: int = 0) -> Any:
    """SIGKILL at a random step of the engine's; skipped (0 tried) where there is no vLLM."""
    from faults import Outcome

    outcome = Outcome("engine killed in mid-rollout")
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        outcome.notes = ("not tried: there is no vLLM in .venv-vllm",)
        return outcome
    command = [str(python), __file__, str(times), str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            outcome.tried += 1
            found = json.loads(line)
            outcome.lost += found["lost"]
            outcome.survived += found["error"] == ""
            if found["error"]:
                outcome.notes += (found["error"],)
    if outcome.tried < times:
        outcome.notes += (f"ended early: {done.stderr.strip()[-300:]}",)
        outcome.tried = times
    return outcome


class Victims:
    """One engine after another; each repeats the step that the one before it died in."""

    def __init__(self, folder: Path) -> None:
        from vllm_samples import make_model, random_prompts

        self.folder = folder
        self.stores: dict[str, Any] = {}
        make_model(folder / "model")
        self.prompts = random_prompts(8)
        self.start()
        self.expected = self.steps("undisturbed", [0, 1])

    def start(self) -> None:
        from vllm_samples import LLM_ARGS

        from spec_rollout.engines.vllm import VLLMEngine

        others = set(multiprocessing.active_children())
        model = str(self.folder / "model")
        self.engine = VLLMEngine(model, num_speculative_tokens=7, llm_args=LLM_ARGS)
        (self.process,) = set(multiprocessing.active_children()) - others

    def steps(self, name: str, numbers: list[int]) -> list[Any]:
        """Responses of some steps with the store of that name."""
        from vllm_samples import rows_of

        from spec_rollout.acceptance import Lenient
        from spec_rollout.cache import MemoryStore, RolloutCache
        from spec_rollout.rollout import RolloutSession
        from spec_rollout.types import SamplingParams

        cache = RolloutCache(store=self.stores.setdefault(name, MemoryStore()))
        session = RolloutSession(self.engine, Lenient(0.5), cache=cache)
        sampling = SamplingParams(max_tokens=60)
        return [
            rows_of(session.rollout(self.prompts, 2, sampling, step=n, epoch=n)) for n in numbers
        ]

    def stored(self, name: str) -> list[Any]:
        return [(key, dict(samples)) for key, samples in self.stores[name].iterate()]

    def kill_one(self, name: str, step_of_engine: int) -> dict[str, Any]:
        """SIGKILL before that step of the engine's, in the second rollout of a store."""
        self.steps(name, [0])
        before, left = self.stored(name), step_of_engine

        def kill() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(self.process.pid, signal.SIGKILL)

        self.engine.before_step = kill
        start = time.monotonic()
        message = ""
        try:
            self.steps(name, [1])
        except Exception as error:
            message = repr(error)
        seconds = time.monotonic() - start
        problem = ""
        if "EngineDead" not in message:
            problem = f"expected an error that says that the engine is dead, got {message:.200}"
        elif seconds > _MOST_SECONDS:
            problem = f"the step failed after {seconds:.0f} seconds only"
        after = self.stored(name)
        lost = max(len(before), len(after)) - sum(map(before.__contains__, after))
        self.engine.close()
        self.start()
        again = self.steps(name, [1])[0]
        lost += sum(a != b for a, b in zip(again, self.expected[1], strict=True))
        return {"lost": lost, "error": problem}


def main() -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_CPU_KVCACHE_SPACE="1",
        TORCH_COMPILE_DISABLE="1",  # a helper for token ranks: a minute, once per process
    )
    sys.path[:0] = [str(ROOT / "tests" / "engines" / "vllm_plugin")]
    times, seed = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        victims, rng = Victims(Path(folder)), random.Random(seed)
        for number in range(times):
            found = victims.kill_one(f"store-{number}", rng.randrange(1, 12))
            print(json.dumps(found), flush=True)
        victims.engine.close()


if __name__ == "__main__":
    main()
