"""The package as others get it: an sdist of this tree, a wheel built from the sdist, and that wheel
installed elsewhere. CPU kernels only; nothing is downloaded, and the installation that runs the
tests is not touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(command: Sequence[str | Path], cwd: Path, **variables: str) -> str:
    """Output of a command that must succeed; its environment leads to no other installation."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**keep, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def not_sources(folder: str, names: list[str]) -> list[str]:
    """What a checkout has beside its sources. A build writes into its folder, so it gets a copy."""
    made = re.compile(r"(.*\.(so|egg-info)|__pycache__)$")
    top = re.compile(r"(\..*|build|dist|runs|wheelhouse)$")
    at_top = Path(folder) == ROOT
    return [name for name in names if made.match(name) or (at_top and top.match(name))]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=not_sources)
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run([sys.executable, "-c", program], folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    tools = Path(sys.executable).parent
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run(
        [*command, "--wheel-dir", folder, "."],
        sdist,
        PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
        SPEC_ROLLOUT_CUDA="OFF",
        SPEC_ROLLOUT_BUILD_LOG="",
        # Compiled sooner; what is packed is the same.
        CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug",
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a new environment with the wheel in it, and with the torch that is here."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", wheel]
    run([sys.executable, "-m", "pip", "--python", python, *install], folder)
    # Only now, so that pip has never seen what else is installed. Lines of a .pth file are folders,
    # whose own .pth files are not read: that of the package in place has no effect.
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder)
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(site.strip()) / "torch.pth").write_text("\n".join(packages))
    return python


def sources() -> set[str]:
    """Everything in the package's folder that belongs to it, the extension aside."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "spec_rollout").rglob("*")}
    return {
        name for name in found if re.search(r"\.(py|pyi|typed|json|safetensors|html|css)$", name)
    }


def test_the_sdist_has_what_a_build_needs(sdist: Path) -> None:
    for folder in ("csrc", "python_bindings", "build_tools"):
        want = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.*")}
        want = {path for path in want if path.suffix != ".pyc"}
        assert want <= {path.relative_to(sdist) for path in (sdist / folder).rglob("*.*")}
    assert not (sdist / "tests").exists()


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        entries = content.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    info = f"spec_rollout-{PROJECT['version']}.dist-info/"
    package = {name for name in names if not name.startswith(info)}
    extension = f"spec_rollout/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert package == sources() | {extension}
    assert {"spec_rollout/py.typed", "spec_rollout/demo/assets/model/model.safetensors"} <= package
    assert f"{info}licenses/LICENSE" in names
    assert "spec-rollout = spec_rollout.cli:main" in entries
    assert "[vllm.general_plugins]" in entries


def test_the_wheel_works_away_from_the_sources(python: Path, tmp_path: Path) -> None:
    program = """
import json, math, torch, spec_rollout
from spec_rollout import ops
logits = torch.tensor([[0.0, math.log(3.0)]])
got = ops.token_logprobs(logits, torch.tensor([1], dtype=torch.int32)).item()
print(json.dumps([spec_rollout.__file__, spec_rollout.__version__, got, ops.build_info()]))
"""
    file, version, got, build = json.loads(run([python, "-c", program], tmp_path))
    assert Path(file).is_relative_to(python.parents[1])
    assert version == build["version"] == PROJECT["version"]
    assert got == pytest.approx(-0.2876820724517809)  # ln 3/4
    assert build["cuda"] is False
    assert build["cuda_reason"] == "CPU kernels only: SPEC_ROLLOUT_CUDA=OFF"


def test_the_command_works_away_from_the_sources(python: Path, tmp_path: Path) -> None:
    command = python.with_name("spec-rollout")
    assert run([command, "--version"], tmp_path).strip() == PROJECT["version"]
    doctor = run([command, "doctor"], tmp_path).splitlines()
    assert "built for cuda  no; CPU kernels only: SPEC_ROLLOUT_CUDA=OFF" in doctor
    assert doctor[-1] == "core works"


def test_the_installation_that_runs_the_tests_is_as_it_was(python: Path) -> None:
    import spec_rollout

    assert python.exists()
    assert Path(spec_rollout.__file__).is_relative_to(ROOT)
