"""The keys of the configurations in which the runs of a page differ."""

from __future__ import annotations

from spec_rollout.report import Run, render_page
from spec_rollout.report.differences import difference_rows

_NONE = "\N{EN DASH}"
_BASE = """
[rollout]
rule = "{rule}"
temperature = {temperature}
max_tokens = 60
[log]
run_dir = "runs/{rule}"
"""


def run(rule: str, temperature: object = 1.0, more: str = "") -> Run:
    return Run(rule, config=_BASE.format(rule=rule, temperature=temperature) + more)


def test_only_what_differs_is_listed_in_the_order_of_the_files() -> None:
    problems: list[str] = []
    runs = [
        run("lenient"),
        run("coupled", 0.5),
        run("none", more='[data]\npath = ""\nskip = [true, 2]\n'),
    ]
    assert difference_rows(runs, problems) == [
        ["rollout.rule", "lenient", "coupled", "none"],
        ["rollout.temperature", "1.0", "0.5", "1.0"],
        ["data.path", _NONE, _NONE, "(empty)"],
        ["data.skip", _NONE, _NONE, "true, 2"],
    ]
    assert problems == []


def test_equal_values_are_no_difference_not_even_nan() -> None:
    assert difference_rows([run("a", "nan"), run("a", "nan")], []) == []
    assert difference_rows([run("a", "1"), run("a", "1.0")], [])[0][0] == "rollout.temperature"


def test_a_configuration_that_cannot_be_read_is_named_and_not_compared() -> None:
    problems: list[str] = []
    runs = [run("a"), Run("b", config="rule ="), Run("c"), run("d")]
    assert difference_rows(runs, problems) == [["rollout.rule", "a", _NONE, _NONE, "d"]]
    assert len(problems) == 1
    assert problems[0].startswith("b: config.toml: not readable (")
    deep = Run("e", config="x = " + "[" * 5000 + "]" * 5000)
    assert difference_rows([runs[0], deep], problems) == []
    assert len(problems) == 2


def test_the_page_has_the_table_where_there_is_something_to_compare() -> None:
    page = render_page([run("lenient"), run("<coupled>")])
    assert "<h2>What differs</h2>" in page
    assert "<td>rollout.rule</td><td>lenient</td><td>&lt;coupled&gt;</td>" in page
    assert "run_dir</td>" not in page
    assert "Nothing in the configurations but the folders." in render_page([run("a"), run("a")])
    assert "What differs" not in render_page([run("a"), Run("b")])
