"""Everything that is to be known from a GPU that is at hand for a quarter of an hour.

    python benchmarks/gpu/session.py --out OUT
    python benchmarks/gpu/session.py --out OUT --model FOLDER --moved MOVED_FOLDER --data FILE.jsonl

builds the kernels for the GPU that is there, runs its tests, and measures Model Runner V2 beside V1
and stock vLLM (`v2_engines.py`: schedulers, chunks, CUDA graphs, memory, whether tokens stay), and
whole rollouts: stock vLLM, the plugin idle, and each mode of an engine that proposes by itself, in
the first pass, the second and one after an update of the weights (`bench_serving.py` says what each
is). Each phase is a process of its own with a limit; what it prints goes to OUT/<phase>.log as it
comes, and results are written after every contender or batch size. So a session that is cut short
leaves all it had found; `--phases` leaves out what is known already.

Without `--model` the demo's model answers: its steps are so short that they show what the plugin
costs and not what it saves. `tools/real_model.py` makes a model that speaks, and a moved copy.

`--dry-run` goes the same way on a CPU, without the build, on the smallest sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Seconds that are kept for what comes after the last phase: copying the results.
_RESERVE = 20.0
PHASES = ("build", "tests", "v2", "rollouts")


@dataclass(frozen=True)
class Phase:
    """A command, and how many seconds it may take at most."""

    name: str
    command: list[str]
    limit: float


def phases(args: argparse.Namespace) -> list[Phase]:
    """What is done, in order."""
    python = sys.executable
    serving = [python, "benchmarks/bench_serving.py", "--out", str(args.out)]
    v2 = [python, "benchmarks/gpu/v2_engines.py", "--out", str(args.out)]
    if args.dry_run:
        serving += ["--quick", "--contenders", "stock", "coupled", "--max-tokens", "16"]
        tests = [python, "-m", "pytest", "-q", "tests/test_acceptance.py"]
        found = [
            Phase("tests", tests, 300.0),
            Phase("v2", [*v2, "--quick"], 600.0),
            Phase("rollouts", serving, 600.0),
        ]
        return [phase for phase in found if phase.name in args.phases]
    serving += ["--contenders", "stock", "idle", "drafting", "coupled", "lenient"]
    serving += ["--batches", *map(str, args.batches), "--repeats", "3"]
    serving += ["--max-tokens", str(args.max_tokens), "--budget", str(args.seconds * 0.35)]
    v2 += ["--max-tokens", str(args.max_tokens), "--budget", str(args.seconds * 0.3)]
    if args.model:
        v2 += ["--model", str(args.model), "--data", str(args.data), "--dtype", args.dtype]
        v2 += ["--max-model-len", str(args.max_tokens + 512)]
        serving += ["--model", str(args.model), "--dtype", args.dtype]
        serving += ["--max-model-len", str(args.max_tokens + 512)]
        serving += ["--data", str(args.data), "--moved", str(args.moved or args.model)]
    build = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    found = [
        Phase("build", build, 240.0),
        Phase("tests", [python, "-m", "pytest", "-q", "-m", "gpu"], 150.0),
        Phase("v2", v2, args.seconds * 0.35),
        Phase("rollouts", serving, args.seconds * 0.6),
    ]
    return [phase for phase in found if phase.name in args.phases]


def run(phase: Phase, out: Path, seconds_left: float) -> dict[str, object]:
    """Runs a phase, for as long as its limit and the session allow.

    Returns:
        Its name, seconds, and exit status; None where it was cut.
    """
    limit = min(phase.limit, seconds_left)
    start = time.monotonic()
    status: int | None = None
    print(f"== {phase.name}: at most {limit:.0f} s", flush=True)
    with (out / f"{phase.name}.log").open("wb") as log:
        process = subprocess.Popen(
            phase.command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SPEC_ROLLOUT_CUDA": os.environ.get("SPEC_ROLLOUT_CUDA", "AUTO")},
            start_new_session=True,  # its children end with it
        )
        try:
            status = process.wait(max(limit, 0.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
    tail = (out / f"{phase.name}.log").read_text(errors="replace").splitlines()[-12:]
    print("\n".join(tail), flush=True)
    return {"phase": phase.name, "seconds": round(time.monotonic() - start, 1), "status": status}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    options.add_argument("--model", type=Path, help="folder of a model that speaks")
    options.add_argument("--moved", type=Path, help="folder of its weights after an update")
    options.add_argument("--data", type=Path, help="JSONL with a prompt or a question in each row")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256, 1024])
    options.add_argument("--max-tokens", type=int, default=512)
    options.add_argument("--seconds", type=float, default=780.0, help="of the whole session")
    options.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    options.add_argument("--dry-run", action="store_true")
    args = options.parse_args()
    if args.model and not args.data:
        options.error("--model: expected --data with it")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds - _RESERVE
    done = []
    for phase in phases(args):
        done.append(run(phase, args.out, end - time.monotonic()))
        (args.out / "session.json").write_text(json.dumps(done, indent=1) + "\n")
        if phase.name == "build" and done[-1]["status"] != 0:
            return 1  # nothing else would be of this version
    return 0 if all(one["status"] == 0 for one in done) else 1


if __name__ == "__main__":
    sys.exit(main())
