"""Which kernels a build gets, with an nvidia-smi and an nvcc that say what the test wants."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "build_tools" / "cuda_choice.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_choice", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cuda_choice = load()
KNOWN = (75, 80, 86, 90, 100, 120)


class Machine:
    """A PATH with an nvidia-smi, an nvcc, both or neither."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # No toolkit of the real machine's: where nvcc is not on PATH, CUDA_HOME leads nowhere.
        self.environ = {"PATH": str(folder), "CUDACXX": str(folder / "nvcc")}

    def program(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def nvidia_smi(self, *capabilities: str) -> None:
        lines = "\\n".join(capabilities)
        self.program(
            "nvidia-smi", f'case "$1" in --query-gpu=compute_cap) printf "{lines}\\n";; esac'
        )

    def nvcc(self, known: tuple[int, ...] = KNOWN) -> None:
        listed = "\\n".join(f"compute_{number}" for number in known)
        self.program("nvcc", f'[ "$1" = --list-gpu-arch ] && printf "{listed}\\n"')

    def choose(self, **variables: str):  # type: ignore[no-untyped-def]  # of a module loaded by path
        return cuda_choice.choose(self.environ | variables)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


needs_no_driver = pytest.mark.skipif(
    Path("/proc/driver/nvidia/gpus").is_dir(), reason="the driver of this machine shows a GPU"
)


@needs_no_driver
def test_without_a_gpu_only_cpu_kernels_are_built(machine: Machine) -> None:
    machine.nvcc()
    choice = machine.choose()
    assert choice.architectures == ()
    assert choice.nvcc is None
    assert choice.reason == (
        "CPU kernels only: no NVIDIA GPU found (SPEC_ROLLOUT_CUDA=ON builds the CUDA kernels anyway)"
    )
    assert not choice.warning


@pytest.mark.parametrize(
    ("capabilities", "architectures"),
    [
        (["9.0"], ("90",)),
        (["9.0"] * 8, ("90",)),  # eight of a kind
        (["10.0", "8.0", "10.0"], ("80-real", "100")),  # PTX of the newest only
        (["7.5", "8.6"], ("86",)),  # the kernels do not run on the older one
        (["12.0"], ("120",)),
        (["10.3"], ("80-real", "90-real", "100")),  # this nvcc does not know it: PTX of an older
    ],
)
def test_a_gpu_gets_its_own_architecture(
    machine: Machine, capabilities: list[str], architectures: tuple[str, ...]
) -> None:
    machine.nvcc()
    machine.nvidia_smi(*capabilities)
    choice = machine.choose()
    assert choice.architectures == architectures
    assert choice.nvcc == machine.environ["CUDACXX"]
    assert choice.reason.startswith(f"CUDA kernels for {', '.join(architectures)}: ")
    remark = ", as nvcc does not know its 10.3" if capabilities == ["10.3"] else ""
    assert choice.reason.endswith(f": for the NVIDIA GPU here{remark}")


def test_a_driver_too_old_to_say_the_capability_gets_every_architecture(machine: Machine) -> None:
    machine.nvcc()
    # What an old nvidia-smi does with a query that it does not know, and its list.
    machine.program(
        "nvidia-smi", '[ "$1" = -L ] && echo "GPU 0: NVIDIA A100 (UUID: GPU-0)" || exit 2'
    )
    assert machine.choose().architectures == ("80-real", "90-real", "100")


def test_a_driver_without_nvidia_smi_shows_its_gpus(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "driver" / "gpus").mkdir(parents=True)
    assert cuda_choice.find_gpus(machine.environ, tmp_path / "driver") == []
    (tmp_path / "driver" / "gpus" / "0000:01:00.0").mkdir()
    assert cuda_choice.find_gpus(machine.environ, tmp_path / "driver") == [""]


@needs_no_driver
def test_an_nvidia_smi_that_finds_no_driver_is_no_gpu(machine: Machine) -> None:
    machine.nvcc()
    machine.program("nvidia-smi", 'echo "NVIDIA-SMI has failed because ... 9.0"; exit 9')
    assert machine.choose().architectures == ()


@pytest.mark.parametrize("capabilities", [["9.0"], ["7.0"]])
def test_a_gpu_that_will_not_be_used_is_a_warning(
    machine: Machine, capabilities: list[str]
) -> None:
    machine.nvidia_smi(*capabilities)
    if capabilities == ["7.0"]:
        machine.nvcc()
    choice = machine.choose()
    assert choice.architectures == ()
    assert choice.warning
    expected = {
        "9.0": "but no CUDA compiler; put nvcc on PATH",
        "7.0": "older than compute capability 8.0",
    }
    assert expected[capabilities[0]] in choice.reason


def test_off_builds_none_whatever_is_there(machine: Machine) -> None:
    machine.nvcc()
    machine.nvidia_smi("9.0")
    choice = machine.choose(SPEC_ROLLOUT_CUDA="OFF", TORCH_CUDA_ARCH_LIST="9.0")
    assert choice.architectures == ()
    assert choice.reason == "CPU kernels only: SPEC_ROLLOUT_CUDA=OFF"


@pytest.mark.parametrize(
    ("known", "architectures"),
    [
        (KNOWN, ("80-real", "90-real", "100")),
        ((75, 80, 86, 90), ("80-real", "90")),  # before CUDA 12.8
    ],
)
def test_on_builds_every_architecture_without_a_gpu(
    machine: Machine, known: tuple[int, ...], architectures: tuple[str, ...]
) -> None:
    machine.nvcc(known)
    assert machine.choose(SPEC_ROLLOUT_CUDA="on").architectures == architectures
    machine.nvidia_smi("9.0")
    assert machine.choose(SPEC_ROLLOUT_CUDA="ON").architectures == architectures


@pytest.mark.parametrize("mode", ["AUTO", "ON"])
@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(
    ("variables", "architectures"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "9.0;10.0+PTX"}, ("90-real", "100")),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 8.0 9.0a"}, ("80-real", "90a-real")),  # 7.5 is too old
        (
            {"CMAKE_ARGS": "-G Ninja '-DCMAKE_CUDA_ARCHITECTURES=90;100-virtual'"},
            ("90", "100-virtual"),
        ),
        (
            {"CMAKE_ARGS": "-DCMAKE_CUDA_ARCHITECTURES:STRING=90", "TORCH_CUDA_ARCH_LIST": "8.0"},
            ("90",),
        ),
        ({"CMAKE_ARGS": "-D CMAKE_CUDA_ARCHITECTURES=90 -D A=1"}, ("90",)),
    ],
)
def test_architectures_that_are_named_are_built(
    machine: Machine,
    mode: str,
    gpu: bool,
    variables: dict[str, str],
    architectures: tuple[str, ...],
) -> None:
    machine.nvcc()
    if gpu:
        machine.nvidia_smi("8.0")
    choice = machine.choose(SPEC_ROLLOUT_CUDA=mode, **variables)
    assert choice.architectures == architectures


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SPEC_ROLLOUT_CUDA": "yes"}, "SPEC_ROLLOUT_CUDA: expected AUTO, ON or OFF, got YES"),
        ({"SPEC_ROLLOUT_CUDA": "ON"}, "SPEC_ROLLOUT_CUDA=ON: no CUDA compiler found"),
        (
            {"TORCH_CUDA_ARCH_LIST": "Hopper"},
            "TORCH_CUDA_ARCH_LIST: expected numbers .* got Hopper",
        ),
        ({"TORCH_CUDA_ARCH_LIST": "6.1;7.5"}, "TORCH_CUDA_ARCH_LIST: expected one of 8.0 or newer"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    machine: Machine, variables: dict[str, str], message: str
) -> None:
    with pytest.raises(cuda_choice.ChoiceError, match=message):
        machine.choose(**variables)


def test_nvcc_is_found_on_the_path_and_in_the_toolkit(machine: Machine, tmp_path: Path) -> None:
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    machine.nvcc()
    (tmp_path / "nvcc").rename(toolkit / "bin" / "nvcc")
    nvcc = str(toolkit / "bin" / "nvcc")
    assert cuda_choice.find_nvcc({"PATH": str(tmp_path), "CUDA_HOME": str(toolkit)}) == nvcc
    assert cuda_choice.find_nvcc({"PATH": str(toolkit / "bin")}) == nvcc
    arguments = {"PATH": "", "CMAKE_ARGS": f"-DCMAKE_CUDA_COMPILER={nvcc}", "CUDACXX": "/nowhere"}
    assert cuda_choice.find_nvcc(arguments) == nvcc
    assert cuda_choice.find_nvcc({"PATH": "", "CUDACXX": "/nowhere/nvcc"}) is None


def test_the_command_prints_the_line_of_a_build(machine: Machine) -> None:
    machine.nvidia_smi("9.0")
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, **machine.environ, "SPEC_ROLLOUT_CUDA": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == (
        "spec_rollout: warning: CPU kernels only: an NVIDIA GPU is here, but no CUDA compiler; "
        "put nvcc on PATH or set CUDA_HOME, and build again\n"
    )
