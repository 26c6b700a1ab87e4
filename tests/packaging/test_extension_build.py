"""What setup.py and CMakeLists.txt make of the extension: the one that was built last, and nothing
that is gone. Compilers are left out where it does not matter what they compile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
# As CMake and Ninja: what is made is written again only if it changes. It has a time that is told.
CMAKE = f"""#!{sys.executable}
import os, sys
from pathlib import Path

if sys.argv[1] == "--build":
    made = Path(sys.argv[2]) / {EXTENSION!r}
    if not made.exists() or made.read_text() != os.environ["KERNELS"]:
        made.write_text(os.environ["KERNELS"])
        os.utime(made, (int(os.environ["MADE_AT"]),) * 2)
"""


class Checkout:
    """A checkout with a package of one module, and a compiler that writes $KERNELS."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        shutil.copytree(ROOT / "build_tools", self.folder / "build_tools")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.folder)
        self.module("__init__")
        self.programs = folder / "programs"
        self.programs.mkdir()
        for name in ("cmake", "ninja"):
            (self.programs / name).write_text(CMAKE)
            (self.programs / name).chmod(0o755)

    def module(self, name: str) -> Path:
        path = self.folder / "spec_rollout" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        return path

    def run(self, *command: str, kernels: str = "any", made_at: int = 1000) -> None:
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", *command],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
                "SPEC_ROLLOUT_CUDA": "OFF",
                "SPEC_ROLLOUT_BUILD_LOG": "",
                "KERNELS": kernels,
                "MADE_AT": str(made_at),
            },
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def packed(self) -> Path:
        """The folder that a wheel is made of."""
        (folder,) = self.folder.glob("build/lib*/spec_rollout")
        return folder

    @property
    def in_place(self) -> str:
        return (self.folder / "spec_rollout" / EXTENSION).read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


# Whichever of the two was compiled later.
@pytest.mark.slow
@pytest.mark.parametrize(("in_place_at", "packed_at"), [(1000, 2000), (2000, 1000)])
def test_builds_of_one_checkout_do_not_exchange_their_extension(
    checkout: Checkout, in_place_at: int, packed_at: int
) -> None:
    for _ in range(2):  # the second time there is nothing to compile
        checkout.run("build_ext", "--inplace", kernels="of the GPU here", made_at=in_place_at)
        assert checkout.in_place == "of the GPU here"
        checkout.run("build", kernels="for a wheel", made_at=packed_at)
        assert (checkout.packed / EXTENSION).read_text() == "for a wheel"
        assert checkout.in_place == "of the GPU here"


@pytest.mark.slow
def test_a_module_that_is_gone_is_not_packed(checkout: Checkout) -> None:
    gone = checkout.module("gone")
    checkout.run("build")
    assert (checkout.packed / "gone.py").exists()
    gone.unlink()
    checkout.run("build")
    assert {path.name for path in checkout.packed.iterdir()} == {"__init__.py", EXTENSION}


def test_sources_are_not_taken_for_what_an_earlier_build_left(checkout: Checkout) -> None:
    checkout.run("build", "--build-lib", ".")
    assert (checkout.folder / "spec_rollout" / "__init__.py").exists()


@pytest.mark.slow
def test_whatever_the_reason_for_these_kernels_it_compiles_as_it_stands(tmp_path: Path) -> None:
    reason = "no CUDA compiler; 'put' \"nvcc\" on C:\\new, $<0:x> ${i} @j@ #k %l (CUDA_HOME)"
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in (
        [
            *("cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja"),
            # Compiled sooner; the text is the same.
            "-DCMAKE_BUILD_TYPE=Debug",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPEC_ROLLOUT_CUDA_REASON={reason}",
        ],
        ["ninja", "-C", str(tmp_path), "CMakeFiles/_C.dir/python_bindings/module.cpp.o"],
    ):
        done = subprocess.run(
            command, env={**os.environ, "PATH": tools}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (made,) = tmp_path.rglob("module.cpp.o")
    assert reason.encode() in made.read_bytes()
