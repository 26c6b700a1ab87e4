"""The package's face: public names, imported when asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import spec_rollout


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_loads_nothing_else() -> None:
    result = python(
        "import sys; import spec_rollout; "
        "print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'numpy', 'transformers')]"
        " + [m for m in sys.modules if m.startswith('spec_rollout.')])"
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("name", spec_rollout.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(spec_rollout, name) is getattr(spec_rollout, name)
    assert name in dir(spec_rollout)


def test_the_public_names_are_those_of_the_modules_that_define_them() -> None:
    from spec_rollout.acceptance import Coupled
    from spec_rollout.engines.transformers import TransformersEngine
    from spec_rollout.rollout import RolloutSession

    assert spec_rollout.Coupled is Coupled
    assert spec_rollout.RolloutSession is RolloutSession
    assert spec_rollout.TransformersEngine is TransformersEngine


@pytest.mark.slow
def test_submodules_need_no_import_of_their_own() -> None:
    result = python(
        "import spec_rollout; print(spec_rollout.engines.vllm.extra_args.__name__, "
        "spec_rollout.ops.verify_prefix.__name__)"
    )
    assert result.stdout.split() == ["extra_args", "verify_prefix"], result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'spec_rollout' has no attribute 'Lenjent'"):
        spec_rollout.Lenjent  # noqa: B018


@pytest.mark.slow
def test_a_missing_extra_is_named_in_one_line() -> None:
    # None in sys.modules is Python's own way of saying "not there": import raises as if it were so.
    result = python(
        "import sys; sys.modules['transformers'] = None\nimport spec_rollout\n"
        "try:\n    spec_rollout.TransformersEngine\nexcept ImportError as error:\n    print(error)"
    )
    assert result.stdout.splitlines() == [
        "spec_rollout.TransformersEngine: expected transformers to be installed, found no module of "
        "that name; pip install 'transformers>=5.0'"
    ], result.stderr


@pytest.mark.slow
def test_the_core_works_without_any_extra() -> None:
    result = python(
        "import sys\n"
        "for name in ('transformers', 'vllm', 'matplotlib', 'tqdm', 'safetensors', 'triton'):\n"
        "    sys.modules[name] = None\n"
        "import spec_rollout as s; print(s.__version__, s.RolloutSession, s.Coupled, s.ops)"
    )
    assert result.stdout, result.stderr
