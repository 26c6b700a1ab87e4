"""Builds the extension with CMake and Ninja; everything else is in pyproject.toml.

Environment (docs/install.md):
    SPEC_ROLLOUT_CUDA: AUTO (default: CUDA kernels where there are an NVIDIA GPU and nvcc, for that
        GPU), ON (for A100, H100 and B200; fails without nvcc) or OFF.
    TORCH_CUDA_ARCH_LIST: the architectures, e.g. "9.0;10.0+PTX".
    CMAKE_ARGS: more CMake arguments, e.g. -DCMAKE_CUDA_ARCHITECTURES=90.
    MAX_JOBS: parallel compilations.
    SPEC_ROLLOUT_BUILD_LOG: a file for what the compilers say; of each CUDA kernel, its registers
        and spills (.ci/cuda-check reads it).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

from cuda_choice import ChoiceError, choose  # noqa: E402  (a build starts without this folder)


class Build(build):
    def run(self) -> None:
        # All that lies here is packed, also modules that an earlier build found and that are gone.
        packed = Path(self.build_lib).resolve() / "spec_rollout"
        if packed.is_dir() and packed != ROOT / "spec_rollout":
            shutil.rmtree(packed)
        super().run()


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def run(self) -> None:
        # setuptools has a thrown-away folder for an editable install, and forgets here that this is
        # one. What is used in place gets a folder that stays: the next build compiles what changed.
        self.kept = bool(self.inplace or self.editable_mode)
        # What is copied is what was built now. By its time, a file of another build that has
        # passed through build/lib.* since would stay. CMake decides what is compiled.
        self.force = True
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cmake"
        if self.kept:
            build_dir = ROOT / "build" / f"inplace-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        # A build folder that outlived its isolated environment points at tools that are gone.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = shutil.which("cmake")
        ninja = shutil.which("ninja")
        if cmake is None or ninja is None:
            missing = " and ".join(n for n, p in (("cmake", cmake), ("ninja", ninja)) if p is None)
            raise SystemExit(f"building spec_rollout needs {missing} (pip install cmake ninja)")
        try:
            choice = choose(os.environ)
        except ChoiceError as error:
            raise SystemExit(f"error: {error}") from None
        print(f"spec_rollout: {'warning: ' if choice.warning else ''}{choice.reason}", flush=True)
        log = os.environ.get("SPEC_ROLLOUT_BUILD_LOG")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPEC_ROLLOUT_VERSION={self.distribution.get_version()}",
            f"-DSPEC_ROLLOUT_PTXAS_INFO={'ON' if log else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            # After CMAKE_ARGS, which the choice has read.
            f"-DSPEC_ROLLOUT_CUDA={'ON' if choice.architectures else 'OFF'}",
            f"-DSPEC_ROLLOUT_CUDA_REASON={choice.reason}",
        ]
        if choice.architectures:
            configure += [
                f"-DCMAKE_CUDA_COMPILER={choice.nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(choice.architectures)}",
            ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        said = _compile([cmake, "--build", str(build_dir), "--parallel", jobs], build_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build_dir / target.name), str(target))
        if log:
            # Kernels of an earlier build may still lie in the folder.
            if not choice.architectures:
                said = {name: text for name, text in said.items() if "CUDA object" not in name}
            Path(log).write_text("".join(said.values()))


def _compile(build: list[str], build_dir: Path) -> dict[str, str]:
    """Runs the compilers and returns what they said at each step, also at those that an earlier
    build in this folder made and this one had no need to repeat."""
    record = build_dir / "said.json"
    try:
        said: dict[str, str] = json.loads(record.read_text())
    except (OSError, ValueError):  # a new folder, or a build that was killed
        said, build = {}, [*build, "--clean-first"]
    record.unlink(missing_ok=True)
    with subprocess.Popen(
        build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as compilers:
        assert compilers.stdout is not None
        lines = []
        for line in compilers.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    # Ninja: "[3/39] Building CXX object NAME", then what the compiler printed.
    for step in re.split(r"^(?=\[\d+/\d+\] )", "".join(lines), flags=re.MULTILINE)[1:]:
        said[re.sub(r"^\[\d+/\d+\] ", "", step.partition("\n")[0])] = step
    # What is no longer built does not count.
    said = {name: step for name, step in said.items() if _object_exists(name, build_dir)}
    record.write_text(json.dumps(said))
    if compilers.returncode != 0:
        raise subprocess.CalledProcessError(compilers.returncode, build)
    return said


def _object_exists(step: str, build_dir: Path) -> bool:
    name = step.split()[-1]
    return not step.startswith("Building ") or (build_dir / name).exists()


setup(
    ext_modules=[CMakeExtension("spec_rollout._C")],
    cmdclass={"build": Build, "build_ext": CMakeBuild},
)
