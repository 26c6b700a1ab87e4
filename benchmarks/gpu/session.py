"""Everything that is to be known from a GPU that is at hand for a quarter of an hour.

    python benchmarks/gpu/session.py --prepare FOLDER                       # before, on any machine
    python benchmarks/gpu/session.py --out OUT --policies FOLDER --shape 1.7b
    python benchmarks/gpu/session.py --out OUT --model FOLDER --moved MOVED_FOLDER --data FILE.jsonl

builds the kernels for the GPU that is there, measures whole rollouts: stock vLLM, the plugin idle,
and each mode of an engine that proposes by itself, in the first pass, the second and one after an
update of the weights (`bench_serving.py` says what each is), then Model Runner V2, where the vLLM
that is there has it, beside V1 and stock vLLM (`v2_engines.py`: schedulers, chunks, CUDA graphs,
memory, whether tokens stay), and runs the kernels' tests. Each phase is a process of its own and
has its share of the time that is left when it begins, so that what one does not need the next ones
have; rollouts, which matter most, have most and begin as soon as there is something to run. What a
phase prints goes to OUT/<phase>.log as it comes, and results are written after every contender or
batch size. So a session that is cut short leaves all it had found; `--phases` leaves out what is
known already.

Which model answers: the demo's, if nothing is said. Its steps are so short that they show what the
plugin costs and not what it saves. `--shape` makes one of the size of a real one there
(`random_model.py`), which no network is needed for. `tools/real_model.py` makes a model that
speaks, and a moved copy. `--prepare` trains the demo's two policies, for which a machine with
little more than vLLM has not all it takes.

`--dry-run` goes the same way on a CPU, without the build, on the smallest sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path

from random_model import SHAPES

ROOT = Path(__file__).resolve().parents[2]
# Seconds that are kept for what comes after the last phase, copying the results, and in each phase
# for what comes after its last measurement.
_RESERVE, _CLOSING = 15.0, 30.0
_NEEDED = ("build", "model")  # nothing goes without them
PHASES = ("build", "model", "rollouts", "v2", "tests")
_TEST_PROCESSES = 14
_LAST_WORDS = 10.0  # seconds, of _RESERVE
_OLDEST_V2 = (0, 32)  # as in spec_rollout.engines.vllm.compat.versions


@dataclass(frozen=True)
class Phase:
    """A command, of the seconds that it has, and its share of the session's."""

    name: str
    command: Callable[[float], list[str]]
    share: float
    environment: Mapping[str, str] = field(default_factory=dict)


def without_v2() -> str | None:
    """Why the plugin does not run on V2 of the vLLM that is here; None if it does.

    Without the package: it is not built yet, nor on the path.
    """
    packages = packages_distributions().get("vllm")
    if not packages:
        return "vLLM is not installed"
    found = version(packages[0])
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST_V2:
        return f"vLLM {found} is older than {'.'.join(map(str, _OLDEST_V2))}"
    return None


def phases(args: argparse.Namespace) -> list[Phase]:
    """What is done, in order."""
    python = sys.executable
    serving = [python, "benchmarks/bench_serving.py", "--out", str(args.out)]
    v2 = [python, "benchmarks/gpu/v2_engines.py", "--out", str(args.out)]
    tests = [python, "-m", "pytest"]
    if args.policies:
        serving += ["--policies", str(args.policies)]
    if args.dry_run:
        serving += ["--quick", "--contenders", "stock", "coupled", "--max-tokens", "16"]
        found = [
            Phase("rollouts", lambda _: serving, 0.4),
            Phase("v2", lambda _: [*v2, "--quick"], 0.4),
            Phase("tests", lambda _: [*tests, "tests/test_acceptance.py"], 0.2),
        ]
        return [phase for phase in found if phase.name in args.phases]
    model, moved = args.model, args.moved or args.model
    making: list[str] = []
    if args.shape:
        folder = Path(tempfile.gettempdir()) / f"spec_rollout_{args.shape}"  # not to be copied
        model, moved = folder / "model", folder / "moved"
        making = [python, "benchmarks/gpu/random_model.py", str(model), "--moved", str(moved)]
        making += ["--shape", args.shape, "--dtype", args.dtype]
    serving += ["--contenders", *args.contenders]
    serving += ["--batches", *map(str, args.batches), "--repeats", "3"]
    serving += ["--max-tokens", str(args.max_tokens), "--logs", str(args.out)]
    v2 += ["--max-tokens", str(args.max_tokens)]
    for command in (v2, serving):
        command += ["--dtype", args.dtype]
    if model:
        for command in (v2, serving):
            command += ["--model", str(model)]
            command += ["--max-model-len", str(args.max_tokens + 512)]
            command += ["--data", str(args.data)] if args.data else []
        serving += ["--moved", str(moved)]
    tests += ["-m", "gpu", "tests/gpu", "tests/ops", "tests/engines/test_transformers.py"]
    if importlib.util.find_spec("xdist"):
        tests += ["-n", str(min(_TEST_PROCESSES, os.cpu_count() or 1)), "--maxfail", "20"]

    def within(command: list[str]) -> Callable[[float], list[str]]:
        return lambda seconds: [*command, "--budget", str(max(0.0, seconds - _CLOSING))]

    # The first notes the package's entry points beside it: vLLM's plugins are found by them.
    build = [python, "setup.py", "--quiet", "egg_info", "build_ext", "--inplace"]
    found = [
        # Seldom as long as they may be; more than these if need be.
        Phase("build", lambda _: build, 0.25),
        Phase("model", lambda _: making, 0.1),
        Phase("rollouts", within(serving), 0.35),
        Phase("v2", within(v2), 0.2),
        # Of each process, else all have as many threads as there are processors.
        Phase("tests", lambda _: tests, 0.1, {"OMP_NUM_THREADS": "1"}),
    ]
    left_out = {"model"} if not making else set()
    if why := without_v2():
        print(f"v2 is left out: {why}", flush=True)
        left_out.add("v2")
    return [phase for phase in found if phase.name in args.phases and phase.name not in left_out]


def limit_of(todo: Sequence[Phase], seconds_left: float) -> float:
    """Seconds of the first phase: its share, among those still to come, of what is left; all of it
    where nothing would come of the others."""
    if todo[0].name in _NEEDED:
        return max(0.0, seconds_left)
    return max(0.0, seconds_left) * todo[0].share / sum(phase.share for phase in todo)


def run(phase: Phase, out: Path, limit: float) -> dict[str, object]:
    """Runs a phase, for `limit` seconds at most.

    Returns:
        Its name, seconds, and exit status; None where it was cut.
    """
    start = time.monotonic()
    status: int | None = None
    print(f"== {phase.name}: at most {limit:.0f} s", flush=True)
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    with (out / f"{phase.name}.log").open("wb") as log:
        process = subprocess.Popen(
            phase.command(limit),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "SPEC_ROLLOUT_CUDA": os.environ.get("SPEC_ROLLOUT_CUDA", "AUTO"),
                **phase.environment,
            },
            # Its children end with it, and all of them with this script.
            process_group=0,
        )

        def end(*_: object) -> None:
            os.killpg(process.pid, signal.SIGKILL)
            raise SystemExit(128 + signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, end)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            # pytest says which tests have failed before it goes.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LAST_WORDS)
            with contextlib.suppress(ProcessLookupError):  # all are gone
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    tail = (out / f"{phase.name}.log").read_text(errors="replace").splitlines()[-12:]
    print("\n".join(tail), flush=True)
    return {"phase": phase.name, "seconds": round(time.monotonic() - start, 1), "status": status}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, help="folder for logs and results")
    options.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write policies there")
    options.add_argument("--policies", type=Path, help="folder that --prepare wrote")
    options.add_argument("--shape", choices=SHAPES, help="of a model to make there")
    options.add_argument("--model", type=Path, help="folder of a model that speaks")
    options.add_argument("--moved", type=Path, help="folder of its weights after an update")
    options.add_argument("--data", type=Path, help="JSONL with a prompt or a question in each row")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--batches", type=int, nargs="+", default=[256, 64, 16])
    options.add_argument("--max-tokens", type=int, default=384)
    options.add_argument(
        "--contenders", nargs="+", default=["stock", "idle", "drafting", "coupled", "lenient"]
    )
    options.add_argument(
        "--seconds", type=float, help="of the whole session (default: 570, 1,500 of a dry run)"
    )
    options.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    options.add_argument("--dry-run", action="store_true")
    args = options.parse_args()
    if args.prepare:
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        from bench_serving import write_policies

        args.prepare.mkdir(parents=True, exist_ok=True)
        write_policies(args.prepare)
        return 0
    if args.out is None:
        options.error("expected --out or --prepare")
    if args.model and not args.data:
        options.error("--model: expected --data with it")
    if args.model and args.shape:
        options.error("--shape: expected without --model")
    if args.seconds is None:
        args.seconds = 1500.0 if args.dry_run else 570.0
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds - _RESERVE
    done = []
    todo = phases(args)
    for number, phase in enumerate(todo):
        limit = limit_of(todo[number:], end - time.monotonic())
        done.append(run(phase, args.out, limit))
        (args.out / "session.json").write_text(json.dumps(done, indent=1) + "\n")
        if phase.name in _NEEDED and done[-1]["status"] != 0:
            return 1  # nothing else would be of this version, or has a model
    return 0 if all(one["status"] == 0 for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
