from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(folder: str, name: str) -> ModuleType:
    """A script of benchmarks/ or tools/, which are no packages."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "tools"))
tables = load("tools", "results_tables")
kernels, rollouts, text_of, training = (
    importlib.import_module(f"renderers.{name}")
    for name in ("kernels", "rollouts", "text", "training")
)
common = load("benchmarks", "_common")


def test_the_tables_of_the_pages_are_those_of_the_results() -> None:
    assert tables.main(["--check"]) == 0


def test_every_results_file_has_a_table_in_a_page() -> None:
    marks = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    folder = ROOT / "benchmarks" / "results"
    names = [path.stem for path in folder.glob("*.json")]
    names += [
        path.name if (path / "ablation.json").is_file() else f"gpu_{path.name}"
        for path in filter(Path.is_dir, folder.iterdir())
    ]
    assert [name for name in names if f"<!-- begin: {name} -->" not in marks] == []


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    # Links do not wrap.
    assert [line for line in lines if len(line) > 120] == []


def test_a_page_that_is_out_of_date_is_named_and_left_alone(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, old = tmp_path / "good.md", tmp_path / "old.md"
    good.write_text("no table\n")
    old.write_text("<!-- begin: ops -->\n<!-- end: ops -->\n")
    arguments = ["--page", str(good), "--page", str(old), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert capsys.readouterr().err == f"error: old.md: expected the tables of {results}\n"
    assert tables.main(arguments) == 0
    assert good.read_text() == "no table\n"
    assert tables.main([*arguments, "--check"]) == 0


def test_every_results_file_says_where_it_comes_from() -> None:
    paths = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    for path in paths:
        content = json.loads(path.read_text())
        assert content["name"] == path.stem
        assert content["command"].startswith(("python ", "spec-rollout "))
        assert len(content["environment"]["commit"]) == 40, path.name
        assert content["environment"]["cpu"]
        assert content["environment"]["packages"]["torch"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results file written by the benchmarks' own helper, with made-up timings."""
    monkeypatch.setattr(common, "copy_bandwidth", lambda: 10e9)
    results = common.Results("ops", tmp_path)
    results.add(
        "token_logprobs",
        timing=common.Timing(1e-3, 2e-3, 3e-3, 5),
        shape={"rows": 256, "vocab": 151936},
        dtype="bfloat16",
        bytes_moved=10_000_000,
        peak_extra=2048,
        peers={"log_softmax": common.Timing(0.01, 0.02, 0.03, 5)},
    )
    results.add(
        "empty",
        timing=common.Timing(1e-6, 2e-6, 3e-6, 5),
        peers={"torch.add": common.Timing(1e-6, 1e-6, 1e-6, 5)},
    )
    results.write()
    return tmp_path


def test_a_block_gets_the_table_of_its_file(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- begin: ops -->\nold\n<!-- end: ops -->\nz\n")
    arguments = ["--page", str(readme), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    row = (
        "| `token_logprobs` | rows 256, vocab 151,936, bfloat16 | 2 ms | 50% | 2 KiB "
        "| log_softmax (20 ms) | **10x** |"
    )
    assert row in text.splitlines()
    assert "| `empty` |  | 2 µs |  |  | torch.add (1 µs) | 0.5x |" in text.splitlines()
    assert text.startswith("a\n<!-- begin: ops -->\n| op |")
    assert text.endswith("<!-- end: ops -->\nz\n")
    assert "Copy bandwidth in the same run: 10.0 GB/s" in text


def test_the_gpu_table_shows_what_was_measured_and_says_what_was_not(tmp_path: Path) -> None:
    measured = common.Results("gpu_logits", tmp_path / "h200", bandwidth=lambda: 4e12)
    measured.add(
        "token_logprobs",
        timing=common.Timing(3e-4, 3.2e-4, 3.3e-4, 9),
        shape={"rows": 4096, "vocab": 151_936},
        dtype="bfloat16",
        bytes_moved=1_244_659_712,
        peers={
            "vllm": common.Timing(6e-4, 6.4e-4, 7e-4, 9),
            "triton": common.Timing(3e-4, 3.2e-4, 3.3e-4, 9),
        },
        absent={"quack": "not installed"},
    )
    measured.write()
    lines = kernels.gpu_table(tmp_path / "h200").splitlines()
    assert lines[2] == (
        "| `token_logprobs` | 4,096, 151,936, bfloat16 | 320 µs | 3,890 | 97% | triton 1x, vllm "
        "**2x** |"
    )
    assert "not measured on a GPU yet" in lines[3]
    assert lines[-3] == "Not timed: quack (not installed) for `token_logprobs`."
    assert lines[-1].startswith("<sub>")
    empty = kernels.gpu_table(tmp_path / "nothing").splitlines()
    assert len(empty) == 2 + len(kernels.GPU_ROWS)
    assert all("not measured on a GPU yet" in line for line in empty[2:])


def test_the_gpu_summary_names_the_fastest_that_is_not_ours_and_ours(tmp_path: Path) -> None:
    measured = common.Results("gpu_logits", tmp_path / "h200", bandwidth=lambda: 4e12)
    fast, slow = common.Timing(3e-4, 3e-4, 3e-4, 9), common.Timing(9e-4, 9e-4, 9e-4, 9)
    logits = {"rows": 4096, "vocab": 151_936}
    coupled = {"shape": {**logits, "accepted": "100%"}, "dtype": "bfloat16"}
    measured.add(
        "token_logprobs",
        timing=fast,
        shape=logits,
        dtype="bfloat16",
        bytes_moved=600_000_000,
        peers={"torch": slow, "our triton": fast, "vllm": common.Timing(6e-4, 6e-4, 6e-4, 9)},
    )
    measured.add(
        "verify_prefix, coupled", timing=fast, bytes_moved=1, peers={"our triton": slow}, **coupled
    )
    measured.write()
    lines = kernels.gpu_summary_table(tmp_path / "h200").splitlines()
    assert lines[2] == (
        "| `token_logprobs` | log-probs of 4,096 tokens | 300 µs | 50% | vllm **2x**, our triton 1x |"
    )
    assert "not measured on a GPU yet" in lines[3]
    assert lines[4].endswith("| our triton **3x** |")
    assert lines[-1].startswith("<sub>")
    assert "torch" in lines[-1]


def test_the_serving_table_says_which_pass_is_a_replay() -> None:
    def row(contender: str, which: str, **more: float) -> dict:
        return {
            "shape": {"batch": 16},
            "which": which,
            "contender": contender,
            "engine_steps": 100.0,
            "engine_steps_over_stock": 0.5,
            "computed_per_token": 1.5,
            "tokens_per_second_over_stock": 2.0,
            **more,
        }

    rows = [row(name, which) for name in ("stock", "drafting", "coupled") for which in ("first",)]
    rows += [
        row("stock", "second", same_as_first=0.0),
        row("drafting", "second", same_as_first=0.5),
    ]
    assert "token for token" not in rollouts.serving_table({"rows": rows})
    rows += [row("coupled", "second", same_as_first=1.0)]
    note = rollouts.serving_table({"rows": rows}).splitlines()[-1]
    assert note.startswith("`coupled`, second pass: the texts of the first, token for token.")


def test_log_probs_that_are_not_read_are_not_counted() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks" / "ops"))
    bytes_of = load("benchmarks/ops", "bench_accept_prefix").bytes_of
    assert bytes_of(1000, 10, 0.0) == 8 * 1010 + 200
    assert bytes_of(1000, 10, float("inf")) == 4 * 1000 + 200  # the target's only


def test_a_block_without_end_is_an_error_and_one_without_results_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    arguments = ["--page", str(readme), "--results", str(tmp_path)]
    text = "<!-- begin: x -->\n<!-- end: y -->\n"
    readme.write_text(text)
    assert tables.main(arguments) == 2
    assert "README.md: expected an end mark" in capsys.readouterr().err
    assert readme.read_text() == text
    readme.write_text("<!-- begin: x -->\nan old table\n<!-- end: x -->\n")
    assert tables.main(arguments) == 0
    assert readme.read_text() == "<!-- begin: x -->\n*Not measured yet.*\n<!-- end: x -->\n"


def test_a_command_line_is_shown_without_the_machines_folders(tmp_path: Path) -> None:
    inside = str(ROOT / "benchmarks" / "bench.py")
    shown = common._relative([inside, "--out", str(tmp_path / "results"), "--threads", "2"])
    assert shown == ["benchmarks/bench.py", "--out", "results", "--threads", "2"]


def test_demo_tables_hold_every_run() -> None:
    run = {
        "seed": 3,
        "rollout_seconds": 10.0,
        "verification_seconds": 1.0,
        "effective_speedup": 1.5,
        "generated_tokens": 1000,
        "response_tokens": 4000,
        "rollout_seconds_after_first_epoch": 7.5,
        "reused_fraction": 0.75,
        "reused_fraction_after_first_epoch": 0.9,
        "fully_reused_fraction": 0.5,
        "accuracy_before": {"train": 0.4, "heldout": 0.3},
        "accuracy_after": {"train": 0.6, "heldout": 0.5},
    }
    demo = {
        "seed": 3,
        "runs": {"vanilla": run, "lenient": run},
        "coupled_equals_off": {"identical": 9, "total": 10, "first_difference": None},
    }
    cells = "10.0 s | 1.0 s | **1.50x** | 1,000 of 4,000 | 75.0% | 50.0% | 40.0% → 60.0% | 30.0% → 50.0% |"
    text = training.demo_table(demo)
    assert f"| lenient | {cells}" in text
    newer = {**demo, "runs": {"vanilla": run, "lenient": {**run, "step_speedup": 1.25}}}
    newer["runs"]["vanilla"] = {**run, "step_speedup": 1.0}
    assert "1.0 s | **1.50x** | **1.25x** | 1,000" in training.demo_table(newer)
    assert "9 of 10 rollouts are the same" in text
    text = training.demo_seeds_table({"summaries": [demo, {**demo, "seed": 4}]})
    assert [line[:15] for line in text.splitlines()[2:]] == [
        "| vanilla | 3 |",
        "| vanilla | 4 |",
        "| lenient | 3 |",
        "| lenient | 4 |",
    ]


def test_drafting_table_shows_two_ways_to_propose() -> None:
    def replay(max_tokens: int, adaptive: bool, min_match: int = 1) -> dict:
        return {
            "op": "history drafting",
            "index": "I",
            "history": "siblings",
            "min_match": min_match,
            "max_tokens": max_tokens,
            "adaptive": adaptive,
            "tokens_per_step": 4.125,
            "computed_per_output": 1.5,
            "longest_rollout_steps_ratio": 3.0,
        }

    speed = {"op": "I, build", "nanoseconds_per_token": 1234.5}
    text = rollouts.drafting_table(
        {"rows": [speed, replay(8, False), replay(16, True), replay(8, False, 2), replay(8, True)]}
    )
    assert text.splitlines()[2:4] == [
        "| I | siblings | 8 | 4.12 | 1.50 | 3.00x |",
        "| I | siblings | 16, at most twice the match | 4.12 | 1.50 | 3.00x |",
    ]
    assert text.splitlines()[-1] == "| I, build | 1,234 ns |  |"


@pytest.mark.parametrize(
    ("value", "text"), [(1.5, "1.5 s"), (0.0215, "21.5 ms"), (3.21e-5, "32.1 µs"), (2e-7, "0.2 µs")]
)
def test_seconds_have_the_fitting_unit(value: float, text: str) -> None:
    assert text_of.seconds(value) == text


def test_percentiles_are_of_the_repeats_without_the_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    durations = iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])

    def job() -> None:
        clock[0] += next(durations)

    assert common.measure(job, repeats=6, warmup=2) == common.Timing(2.0, 3.5, 5.0, 6)
    durations = iter([1.0] * 12)
    assert common.measure(job, repeats=2, warmup=0, min_seconds=5.0).repeats == 5
    assert common.measure(job, repeats=2, warmup=0, calls_per_repeat=3).p50 == 1.0


def test_peak_memory_counts_what_a_call_holds() -> None:
    import torch

    extra = common.peak_extra_bytes(lambda: torch.ones(1 << 26, dtype=torch.uint8))
    if extra is None:
        pytest.skip("this kernel does not let a process reset its high-water mark")
    assert abs(extra - (1 << 26)) < 1 << 23


def test_results_with_nan_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_json(tmp_path / "x.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_the_rollout_table_has_a_line_per_share() -> None:
    def row(strategy: str, share: float | None, p50: float, **paired: float) -> dict:
        return {
            "strategy": strategy,
            "share": share,
            "seconds": {"p50": p50},
            "engine_steps": 7,
            "paired": {name: {"wall": value} for name, value in paired.items()},
        }

    rows = [
        row("stock", None, 2.0),
        row("no key", None, 2.0, stock=0.99),
        row("vanilla", None, 2.1),
    ]
    rows += [row("two_pass", 0.5, 1.8), row("inflight", 0.5, 1.2, vanilla=1.75, two_pass=1.5)]
    text = rollouts.rollout_table({"rows": rows})
    assert text.splitlines()[2] == (
        "| 50% | 2.1 s, 7 steps | 1.8 s, 7 steps | 1.2 s, 7 steps |  | 1.75x | 1.50x |  |"
    )
    assert text.splitlines()[-1].endswith("in vLLM with the plugin: 0.99x.")
