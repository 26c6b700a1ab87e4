from __future__ import annotations

import builtins
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spec_rollout.commands import doctor
from spec_rollout.commands.doctor import Diagnosis, Missing, _covers
from spec_rollout.extras import install_command
from spec_rollout.runs.environment import gpus

ROOT = Path(__file__).resolve().parents[2]


def run_doctor(*blocked: str, arguments: str = "") -> subprocess.CompletedProcess[str]:
    """The doctor in a process of its own in which importing the `blocked` modules fails."""
    program = textwrap.dedent(
        f"""
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if any(name == b or name.startswith(b + ".") for b in {blocked!r}):
                    raise ImportError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Block())
        from spec_rollout.cli import main
        sys.exit(main(["doctor", *{arguments.split()!r}]))
        """
    )
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_built_installation_works_and_says_what_was_built() -> None:
    result = run_doctor()
    assert result.returncode == 0, result.stdout + result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if "  " in line)
    assert lines["extension"].startswith("version ")
    assert "self-test cpu   ok" in result.stdout
    assert "built for cpu   generic" in result.stdout
    assert result.stdout.splitlines()[-1] == "core works"
    assert result.stderr == ""


@pytest.mark.slow
def test_as_json_it_says_the_same() -> None:
    content = json.loads(run_doctor(arguments="--json").stdout)
    assert content["core_works"] is True
    assert content["self_test"]["cpu"] == "ok"
    assert content["environment"]["native"]["isa_levels"][0] == "generic"
    assert {"what", "needed_for", "fix"} == set(content["missing"][0])


@pytest.mark.slow
def test_without_the_extension_it_says_so_and_how_to_build_it() -> None:
    result = run_doctor("spec_rollout._C")
    assert result.returncode == 1
    assert "extension       missing" in result.stdout
    assert "the compiled extension spec_rollout._C cannot be imported" in result.stdout
    assert f"in a source checkout: {doctor.REBUILD}" in result.stdout
    assert result.stdout.splitlines()[-1] == "core does NOT work"
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
def test_in_a_checkout_without_an_extension_it_says_that_this_is_the_checkout(
    tmp_path: Path,
) -> None:
    made = shutil.ignore_patterns("*.so", "__pycache__", "assets")
    shutil.copytree(ROOT / "spec_rollout", tmp_path / "spec_rollout", ignore=made)
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    # The finder of an editable installation has the extension of that one for any `spec_rollout`.
    program = (
        "import sys; sys.meta_path = [x for x in sys.meta_path if 'Editable' not in repr(x)]; "
        "from spec_rollout.cli import main; sys.exit(main(['doctor']))"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    advice = (
        f"this is the checkout in {tmp_path.resolve()}, not the installed package: run from "
        "another folder, or `pip install -e .` there"
    )
    assert result.returncode == 1
    assert f"      fix: {advice}" in result.stdout.splitlines()
    # What any use of the ops says, here the self-test.
    assert f"No module named 'spec_rollout._C'); {advice} (`spec-rollout" in result.stdout


def test_wrong_numbers_of_the_ops_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from spec_rollout import ops

    right = ops.token_logprobs
    monkeypatch.setattr(ops, "token_logprobs", lambda *a, **k: right(*a, **k) + 0.01)
    diagnosis = doctor.diagnose()
    assert not diagnosis.core_works
    assert diagnosis.self_test["cpu"].startswith("token_logprobs: expected [-0.287")
    assert any("self-test fails" in item.what for item in diagnosis.missing)


def test_missing_packages_of_extras_say_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name != "pyarrow" else object())
    assert doctor._missing_extras() == [
        Missing(
            "datasets not installed", "Parquet files and data sets", install_command("datasets")
        ),
        Missing(
            "math-verify not installed", "the reward math_verify", install_command("math_verify")
        ),
    ]
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    assert doctor._missing_extras() == []


def test_missing_training_packages_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2", "numpy": "2", "matplotlib": "3"}
    monkeypatch.setattr("spec_rollout.runs.environment.package_version", versions.get)
    missing = doctor.diagnose().missing
    command = (
        "pip install 'matplotlib>=3.8' 'safetensors>=0.4.3' 'tomli-w>=1.0' 'tqdm>=4.66' "
        "'transformers>=5.0'"
    )
    assert Missing("transformers not installed", "training", command) in missing


@pytest.mark.parametrize(
    ("archs", "device", "runs"),
    [
        (["80-real"], "sm_80", True),
        (["80-real"], "sm_86", True),  # machine code runs on later minor versions
        (["86-real"], "sm_80", False),
        (["80-real"], "sm_90", False),  # but not on another major version
        (["80"], "sm_90", True),  # PTX is compiled for it
        (["90-virtual"], "sm_80", False),
        (["80-real", "90-real", "100"], "sm_120", True),
        (["80-real", "90-real"], "sm_120", False),
        ([], "sm_80", False),
        (["90a-real"], "sm_90", True),
        (["90a"], "sm_100", False),  # this one alone, its PTX too
        (["80-real", "100a-real"], "sm_103", False),
        (["100f-real"], "sm_103", True),  # the family
        (["100f-virtual"], "sm_120", False),
        (["103f"], "sm_100", False),
        (["native"], "sm_90", True),  # whatever that was: the self-test says
        (["all"], "sm_90", True),
        (["all-major"], "sm_90", True),
    ],
)
def test_which_devices_the_cuda_objects_run_on(archs: list[str], device: str, runs: bool) -> None:
    assert _covers(archs, device) is runs


def test_gpu_with_objects_of_another_architecture_is_told_what_to_build() -> None:
    native = {"cuda": True, "cuda_archs": ["90-real"], "cuda_version": "13.0"}
    env = {"native": native, "packages": {"torch": None}, "gpus": [{"name": "A", "arch": "sm_80"}]}
    missing = doctor._missing_gpu(env, {"cuda": "ok"})
    assert [item.what for item in missing] == ["A is sm_80; CUDA objects are for 90-real"]
    assert missing[0].fix == f"CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=80 {doctor.REBUILD}"


def test_one_build_serves_all_gpus_that_are_there() -> None:
    """Built for the one that is missing alone, the next advice would be to build for the other."""
    native = {"cuda": True, "cuda_archs": ["90-real"], "cuda_version": "13.0"}
    gpus = [
        {"name": n, "arch": f"sm_{a}"} for n, a in (("T", 75), ("A", 80), ("H", 90), ("B", 100))
    ]
    env = {"native": native, "packages": {"torch": None}, "gpus": gpus}
    old, *others = doctor._missing_gpu(env, {"cuda": "ok"})
    assert (old.what, old.fix) == ("T is sm_75: kernels need sm_80 or newer", None)
    assert [item.what.partition(";")[0] for item in others] == ["A is sm_80", "B is sm_100"]
    assert {item.fix for item in others} == {
        f"CMAKE_ARGS='-DCMAKE_CUDA_ARCHITECTURES=80;90;100' {doctor.REBUILD}"
    }


@pytest.mark.parametrize("error", [ImportError("undefined symbol: x"), OSError("libmkl.so.2")])
def test_a_torch_that_cannot_be_imported_is_diagnosed(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise error
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", broken)
    env = {"native": {"cuda": True}, "packages": {"torch": "2.13.0"}, "gpus": gpus()}
    assert env["gpus"] == []
    (missing,) = doctor._missing_gpu(env, {"cuda": "ok"})
    assert (missing.what, missing.needed_for) == (f"torch cannot be imported: {error}", "core")


def test_a_gpu_that_another_process_holds_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(index: int) -> Any:
        if index == 0:
            raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")
        return SimpleNamespace(name="H", total_memory=2**37, major=9, minor=0)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", properties)
    assert gpus() == [{"name": "H", "memory_gib": 128.0, "arch": "sm_90"}]


@pytest.mark.parametrize(
    ("failure", "torch_cuda", "fix"),
    [
        (
            "CUDA driver version is insufficient for CUDA runtime version",
            "12.8",
            "install a driver for CUDA 13.0 or newer, or: "
            f"CUDACXX=<nvcc of CUDA 12.8> {doctor.REBUILD}",
        ),
        (
            "the provided PTX was compiled with an unsupported toolchain.",
            "12.8",
            "install a driver for CUDA 13.0 or newer, or: "
            f"CUDACXX=<nvcc of CUDA 12.8> {doctor.REBUILD}",
        ),
        (
            "CUDA driver version is insufficient for CUDA runtime version",
            None,
            "install a driver for CUDA 13.0 or newer",
        ),
        ("token_logprobs: expected [1], got [2]", "12.8", doctor.REBUILD),
    ],
)
def test_a_driver_older_than_the_toolkit_is_not_rebuilt_for_with_the_same_one(
    failure: str, torch_cuda: str | None, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = {"cuda": True, "cuda_archs": ["90"], "cuda_version": "13.0.88"}
    env = {"native": native, "packages": {"torch": None}, "gpus": [{"name": "A", "arch": "sm_90"}]}
    monkeypatch.setattr("torch.version.cuda", torch_cuda)
    missing = doctor._missing_gpu(env, {"cuda": f"RuntimeError: {failure}"})
    assert missing == [Missing(f"the CUDA self-test fails: RuntimeError: {failure}", "GPU", fix)]


@pytest.mark.parametrize(
    ("gpus", "fix"),
    [
        ([{"name": "A", "arch": "sm_80"}], doctor.REBUILD),  # a build finds it
        ([], f"SPEC_ROLLOUT_CUDA=ON {doctor.REBUILD}"),
    ],
)
def test_without_cuda_kernels_the_fix_builds_them(
    gpus: list[dict[str, str]],
    fix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    env = {"native": {"cuda": False}, "packages": {"torch": None}, "gpus": gpus}
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_TOOLKIT", str(tmp_path / "none"))
    assert doctor._missing_gpu(env, {})[0].fix == fix
    compiler.unlink()
    assert doctor._missing_gpu(env, {})[0].fix == (
        f"install the CUDA toolkit (nvcc on PATH), then: {fix}"
    )


@pytest.mark.parametrize(
    ("native", "line"),
    [
        (
            {"cuda": False, "cuda_reason": "CPU kernels only: no NVIDIA GPU found"},
            "built for cuda  no; CPU kernels only: no NVIDIA GPU found",
        ),
        (
            {"cuda": True, "cuda_version": "13.0", "cuda_reason": "CUDA kernels for 90: why"},
            "built for cuda  yes, CUDA 13.0; CUDA kernels for 90: why",
        ),
    ],
)
def test_text_says_why_these_kernels_were_built(native: dict[str, object], line: str) -> None:
    env = doctor.environment() | {"native": native}
    assert line in doctor.render(Diagnosis(env, {"cpu": "ok"})).splitlines()


def test_text_lists_every_missing_thing_with_its_fix() -> None:
    env = doctor.environment() | {"native": None, "gpus": []}
    missing = [Missing("a thing", "GPU", "do this"), Missing("another", "vLLM", None)]
    text = doctor.render(Diagnosis(env, {"cpu": "ok"}, missing))
    assert "  for GPU: a thing\n      fix: do this\n  for vLLM: another\n" in text
