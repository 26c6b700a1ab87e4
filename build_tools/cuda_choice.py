"""Which CUDA kernels a build gets: the one place that decides it, for setup.py and the Makefile.

python build_tools/cuda_choice.py        what a build on this machine would get, in one line
python build_tools/cuda_choice.py nvcc   the CUDA compiler that a build would use, if any
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# A100, H100 and H200, B200.
ALL = ("80", "90", "100")
# What the kernels need at least: bfloat16 arithmetic.
OLDEST = 80
MODES = ("AUTO", "ON", "OFF")


class ChoiceError(ValueError):
    """A variable asks for something that cannot be built; the message is one line."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is built, and why.

    Attributes:
        architectures: As CMake names them ("90-real": machine code, "90": PTX too); empty: the CPU
            kernels only.
        nvcc: The CUDA compiler; None with the CPU kernels only.
        reason: One line for whoever builds.
        warning: Whether the reason is one to act on: a GPU that the build will not use.
    """

    architectures: tuple[str, ...]
    nvcc: str | None
    reason: str
    warning: bool = False


def cmake_define(arguments: str, name: str) -> str | None:
    """Last value of -D`name`=VALUE in `arguments`, also with a space behind -D or with :TYPE behind
    the name; None without one."""
    lines = re.sub(r"^-D\n", "-D", "\n".join(shlex.split(arguments)), flags=re.MULTILINE)
    values = re.findall(rf"^-D{name}(?::\w+)?=(.*)$", lines, re.MULTILINE)
    return values[-1] if values else None


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """The CUDA compiler: what CMAKE_ARGS or CUDACXX names, on PATH, or in the toolkit's folder."""
    named = cmake_define(environ.get("CMAKE_ARGS", ""), "CMAKE_CUDA_COMPILER")
    named = named or environ.get("CUDACXX")
    path = environ.get("PATH", "")
    if named:
        return shutil.which(named, path=path)
    toolkits = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [path, *(os.path.join(toolkit, "bin") for toolkit in toolkits if toolkit)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def find_gpus(environ: Mapping[str, str], proc: Path = Path("/proc/driver/nvidia")) -> list[str]:
    """Compute capabilities of the NVIDIA GPUs of this machine, each once, in ascending order.

    "90" stands for 9.0, "" for a GPU whose driver does not say.
    """
    smi = shutil.which("nvidia-smi", path=environ.get("PATH", ""))
    if smi is not None:
        answer = _output([smi, "--query-gpu=compute_cap", "--format=csv,noheader"])
        found = set(re.findall(r"^\s*(\d+)\.(\d)\s*$", answer, re.MULTILINE))
        if found:
            return sorted((major + minor for major, minor in found), key=int)
        if re.search(r"^GPU \d", _output([smi, "-L"]), re.MULTILINE):
            return [""]
    return [""] if (proc / "gpus").is_dir() and any((proc / "gpus").iterdir()) else []


def _output(command: list[str]) -> str:
    """What a command prints; nothing if it fails, as nvidia-smi does without a driver."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def known_architectures(nvcc: str) -> list[int]:
    """Architectures that a CUDA compiler makes code for, ascending: 80, 90, ..."""
    listed = _output([nvcc, "--list-gpu-arch"])
    return sorted(int(number) for number in re.findall(r"compute_(\d+)$", listed, re.MULTILINE))


def _asked_for(environ: Mapping[str, str]) -> tuple[str, tuple[str, ...]] | None:
    """The variable that names architectures, and what it names; None where none does."""
    named = cmake_define(environ.get("CMAKE_ARGS", ""), "CMAKE_CUDA_ARCHITECTURES")
    if named:
        return "CMAKE_CUDA_ARCHITECTURES", tuple(named.split(";"))
    text = environ.get("TORCH_CUDA_ARCH_LIST", "")
    wanted = []
    for name in re.split(r"[;,\s]+", text.strip()) if text.strip() else []:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise ChoiceError(
                f"TORCH_CUDA_ARCH_LIST: expected numbers such as 9.0 or 9.0+PTX, got {name}"
            )
        major, minor, suffix, ptx = match.groups()
        # The variable is often set for all that is built on a machine, and then names more.
        if int(major + minor) >= OLDEST:
            wanted.append(f"{major}{minor}{suffix}{'' if ptx else '-real'}")
    if text.strip() and not wanted:
        raise ChoiceError(f"TORCH_CUDA_ARCH_LIST: expected one of 8.0 or newer, got {text}")
    return ("TORCH_CUDA_ARCH_LIST", tuple(wanted)) if wanted else None


def _with_ptx(numbers: list[int]) -> tuple[str, ...]:
    """Machine code for each, and PTX of the newest for what comes after it."""
    return (*(f"{number}-real" for number in numbers[:-1]), str(numbers[-1]))


def _for_gpus(gpus: list[str], nvcc: str) -> tuple[tuple[str, ...], str]:
    """Architectures for these GPUs, and a remark where they are not simply those of the GPUs."""
    known = known_architectures(nvcc)
    every = [int(arch) for arch in ALL if int(arch) in known] or [int(ALL[0])]
    if "" in gpus:
        return _with_ptx(every), ", of which nvidia-smi does not say the kind"
    numbers = [int(gpu) for gpu in gpus if int(gpu) >= OLDEST]
    unknown = [number for number in numbers if number not in known]
    if unknown:
        names = ", ".join(f"{number // 10}.{number % 10}" for number in unknown)
        return _with_ptx(every), f", as nvcc does not know its {names}"
    return _with_ptx(numbers), ""


def choose(environ: Mapping[str, str], gpus: list[str] | None = None) -> Choice:
    """Decides what a build gets.

    Args:
        environ: SPEC_ROLLOUT_CUDA, CMAKE_ARGS, TORCH_CUDA_ARCH_LIST, and what leads to nvcc and
            nvidia-smi.
        gpus: As `find_gpus` gives them; None looks for them.

    Raises:
        ChoiceError: A variable has a value that means nothing, or CUDA is ON without nvcc.
    """
    mode = cmake_define(environ.get("CMAKE_ARGS", ""), "SPEC_ROLLOUT_CUDA")
    mode = (mode or environ.get("SPEC_ROLLOUT_CUDA") or "AUTO").upper()
    if mode not in MODES:
        raise ChoiceError(f"SPEC_ROLLOUT_CUDA: expected AUTO, ON or OFF, got {mode}")
    if mode == "OFF":
        return Choice((), None, "CPU kernels only: SPEC_ROLLOUT_CUDA=OFF")
    asked = _asked_for(environ)
    nvcc = find_nvcc(environ)
    if mode == "ON":
        if nvcc is None:
            raise ChoiceError(
                "SPEC_ROLLOUT_CUDA=ON: no CUDA compiler found; put nvcc on PATH or set CUDA_HOME"
            )
        if asked is not None:
            return _cuda(asked[1], nvcc, f"{asked[0]} names them")
        known = known_architectures(nvcc)
        every = [int(arch) for arch in ALL if int(arch) in known]
        return _cuda(_with_ptx(every or [int(ALL[0])]), nvcc, "SPEC_ROLLOUT_CUDA=ON")
    if gpus is None:
        gpus = find_gpus(environ)
    if asked is None and not gpus:
        why = "no NVIDIA GPU found (SPEC_ROLLOUT_CUDA=ON builds the CUDA kernels anyway)"
        return Choice((), None, f"CPU kernels only: {why}")
    if nvcc is None:
        cause = f"{asked[0]} is set" if asked is not None and not gpus else "an NVIDIA GPU is here"
        why = f"{cause}, but no CUDA compiler; put nvcc on PATH or set CUDA_HOME, and build again"
        return Choice((), None, f"CPU kernels only: {why}", warning=True)
    if asked is not None:
        return _cuda(asked[1], nvcc, f"{asked[0]} names them")
    if all(gpu and int(gpu) < OLDEST for gpu in gpus):
        why = f"the NVIDIA GPU here is older than compute capability {OLDEST // 10}.{OLDEST % 10}"
        return Choice((), None, f"CPU kernels only: {why}", warning=True)
    architectures, remark = _for_gpus(gpus, nvcc)
    return _cuda(architectures, nvcc, f"for the NVIDIA GPU here{remark}")


def _cuda(architectures: tuple[str, ...], nvcc: str, why: str) -> Choice:
    return Choice(architectures, nvcc, f"CUDA kernels for {', '.join(architectures)}: {why}")


def main(arguments: list[str]) -> int:
    try:
        if arguments == ["nvcc"]:
            print(find_nvcc(os.environ) or "")
        else:
            choice = choose(os.environ)
            print(f"spec_rollout: {'warning: ' if choice.warning else ''}{choice.reason}")
    except ChoiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
