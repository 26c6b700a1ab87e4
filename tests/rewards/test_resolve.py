"""The function behind a name: built in, installed, or in a module beside the config file."""

from __future__ import annotations

import sys

import pytest

from spec_rollout.config.sections import ConfigError
from spec_rollout.rewards.builtin import exact_match
from spec_rollout.rewards.resolve import resolve

HERE = __name__


async def generator(prompt, response, answer):
    yield 1.0


async def coroutine(prompt, response, answer):
    return 1.0


@pytest.fixture
def module(tmp_path):
    """Writes a module, and forgets it afterwards."""
    written = []
    had = dict(sys.modules)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return tmp_path

    path = list(sys.path)
    yield write
    sys.path[:] = path
    for name in written:
        if sys.modules.get(name) is not had.get(name):
            del sys.modules[name]


def test_built_in_and_dotted_names():
    assert resolve("exact_match") is exact_match
    assert resolve(f"{HERE}:resolve") is resolve
    assert resolve("os:path.join")("a", "b") == "a/b"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "exact",
            "expected 'package.module:function' or one of exact_match, last_number, math_verify, got 'exact'",
        ),
        ("no_such_module_:f", "cannot load 'no_such_module_:f': No module named"),
        (f"{HERE}:absent", "cannot load .*has no attribute 'absent'"),
        (f"{HERE}:HERE", "expected a callable, got str"),
        (f"{HERE}:generator", "expected a function that returns, got the async generator"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ConfigError, match=f"reward.functions: {message}"):
        resolve(name)


def test_a_module_beside_the_config_file_is_found(module):
    module("helper_beside_it", "ONE = 1.0\n")
    folder = module(
        "beside_it",
        "def one(prompt, response, answer):\n"
        "    import helper_beside_it\n"
        "    return helper_beside_it.ONE\n",
    )
    with pytest.raises(ConfigError, match="cannot load 'beside_it:one': No module named"):
        resolve("beside_it:one")
    before = list(sys.path)
    for _ in range(2):
        function = resolve("beside_it:one", folder)
        # Nothing that is installed is hidden, and what the function imports is found.
        assert sys.path == [*before, str(folder)]
    assert function("p", "r", "a") == 1.0
    with pytest.raises(ConfigError, match=rf"No module named .*also looked for in '{folder}'"):
        resolve("not_beside_it:one", folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def one(:\n", "SyntaxError"),
        ("import sys\nsys.exit(0)\n", r"SystemExit\(0\)"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("import no_such_module_\n", "No module named 'no_such_module_'$"),
    ],
)
def test_a_module_that_fails(text, message, module):
    folder = module("failing_module", text)
    with pytest.raises(ConfigError, match=f"cannot load 'failing_module:one': .*{message}"):
        resolve("failing_module:one", folder)


def test_a_module_with_a_name_that_is_taken_is_refused(module, tmp_path):
    folder = module("json", "def one(prompt, response, answer):\n    return 1.0\n")
    kept = sys.modules["json"]
    with pytest.raises(ConfigError, match="a module name that is not taken, got 'json'"):
        resolve("json:one", folder)
    assert sys.modules["json"] is kept
    # One of another config's folder.
    module("rewards_of_mine", "def one(prompt, response, answer):\n    return 1.0\n")
    resolve("rewards_of_mine:one", folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "rewards_of_mine.py").write_text(
        "def one(prompt, response, answer):\n    return 2.0\n"
    )
    with pytest.raises(ConfigError, match=r"got 'rewards_of_mine': .*other/rewards_of_mine\.py"):
        resolve("rewards_of_mine:one", other)
