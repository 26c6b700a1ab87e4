"""Builds the extension with CMake and Ninja; everything else is in pyproject.toml.

Environment:
    SPEC_ROLLOUT_CUDA: AUTO (default: CUDA kernels where nvcc is found), ON (fail without nvcc) or
        OFF.
    CMAKE_ARGS: more CMake arguments, e.g. -DCMAKE_CUDA_ARCHITECTURES=90.
    MAX_JOBS: parallel compilations.
    SPEC_ROLLOUT_BUILD_LOG: a file for what the compilers say; of each CUDA kernel, its registers
        and spills (.ci/cuda-check reads it).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        # A build folder that outlived its isolated environment points at tools that are gone.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        cmake = shutil.which("cmake")
        ninja = shutil.which("ninja")
        if cmake is None or ninja is None:
            missing = " and ".join(n for n, p in (("cmake", cmake), ("ninja", ninja)) if p is None)
            raise SystemExit(f"building spec_rollout needs {missing} (pip install cmake ninja)")
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
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPEC_ROLLOUT_VERSION={self.distribution.get_version()}",
            f"-DSPEC_ROLLOUT_CUDA={os.environ.get('SPEC_ROLLOUT_CUDA', 'AUTO')}",
            f"-DSPEC_ROLLOUT_PTXAS_INFO={'ON' if log else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(configure, check=True)
        build = [cmake, "--build", str(build_dir), "--parallel", jobs]
        if not log:
            subprocess.run(build, check=True)
            return
        done = subprocess.run(build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        Path(log).write_text(done.stdout)
        if done.returncode != 0:
            print(done.stdout, file=sys.stderr)
            done.check_returncode()


setup(ext_modules=[CMakeExtension("spec_rollout._C")], cmdclass={"build_ext": CMakeBuild})
