"""`spec-rollout eval`: the trainer's own evaluation, drafting that changes nothing, mistakes."""

from __future__ import annotations

import argparse
import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spec_rollout import cli
from spec_rollout.commands import eval as command
from spec_rollout.commands import eval_subject
from spec_rollout.config.options import option
from spec_rollout.config.sections import RunConfig
from spec_rollout.config.toml import from_dict
from spec_rollout.demo import model_dir
from spec_rollout.demo.task import heldout_problems, write_jsonl
from spec_rollout.evals.estimates import estimate
from spec_rollout.train import components
from spec_rollout.train.trainer import run

REWARD = "spec_rollout.demo.task:reward"
MODEL = ["eval", "--model", str(model_dir()), "--reward", REWARD, "--max-tokens", "120"]


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    """Six problems, of which one comes twice."""
    path = tmp_path / "heldout.jsonl"
    problems = heldout_problems(6)
    write_jsonl([*problems, problems[0]], path)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def demo_run(tmp_path: Path, heldout: Path) -> RunConfig:
    return from_dict(
        {
            "model": {"path": str(model_dir()), "device": "cpu"},
            "data": {"path": str(heldout)},
            "rollout": {"num_samples": 2, "max_tokens": 120, "num_slots": 16},
            "reward": {"functions": [REWARD]},
            "train": {
                "prompts_per_step": 2, "max_steps": 2, "lr": 4e-4, "kl_coef": 0.0, "seed": 5,
            },
            "eval": {"path": str(heldout), "num_train_prompts": 3, "num_samples": 2},
            "log": {"run_dir": str(tmp_path / "run"), "progress": "off"},
        }
    )  # fmt: skip


@pytest.mark.slow
def test_it_is_the_trainers_own_evaluation(
    tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = demo_run(tmp_path, heldout)
    run_dir = Path(config.log.run_dir)
    run(config)
    first, *_, last = lines(run_dir / "metrics.jsonl")
    out, responses = tmp_path / "eval.json", tmp_path / "responses.jsonl"
    files = ["--out", str(out), "--responses", str(responses)]

    # The shipped checkpoint, as it was before the first step.
    options = ["--num-samples", "2", "--top-p", "1", "--seed", "5", "--num-slots", "1"]
    capsys.readouterr()
    assert cli.main([*MODEL, "--prompts", str(heldout), *options, *files]) == 0
    (figures,) = json.loads(out.read_text())["suites"]
    assert figures["pass@1"] == first["accuracy_heldout"]
    assert 0 < first["accuracy_heldout"] < 1
    rows = lines(responses)
    assert [(row["problem"], row["sample"]) for row in rows] == [
        (p, s) for p in range(7) for s in (0, 1)
    ]
    counts = [(2, sum(row["correct"] for row in rows if row["problem"] == p)) for p in range(7)]
    wanted = estimate(counts)
    assert wanted is not None
    assert figures["pass@1_interval"] == [wanted.low, wanted.high]
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["suite", "problems", "samples", "pass@1"]
    interval = f"{wanted.value:.3f} ({wanted.low:.3f} to {wanted.high:.3f})"
    assert line.startswith("heldout")
    assert interval in line
    # The problem that comes twice has other samples the second time.
    texts = [[row["response"] for row in rows if row["problem"] == p] for p in (0, 6)]
    assert texts[0] != texts[1]

    # The run's checkpoint, with everything from its config.
    assert cli.main(["eval", "--run", str(run_dir), *files]) == 0
    content = json.loads(out.read_text())
    found = {suite["suite"]: suite["pass@1"] for suite in content["suites"]}
    assert found == {"train": last["accuracy_train"], "heldout": last["accuracy_heldout"]}
    assert content["settings"]["step"] == 2
    assert {row["suite"] for row in lines(responses)} == {"train", "heldout"}
    assert cli.main(["eval", "--run", str(run_dir), "--set", "eval.num_samples=1", *files]) == 0
    assert len(lines(responses)) == 10


@pytest.mark.slow
def test_drafting_changes_the_steps_and_no_token(tmp_path: Path, heldout: Path) -> None:
    figures, responses = [], []
    for name, extra in (("plain", []), ("drafted", ["--drafting"])):
        out, texts = tmp_path / f"{name}.json", tmp_path / f"{name}.jsonl"
        argv = [*MODEL, "--prompts", str(heldout), "--num-samples", "6", "--pass-at", "1,4"]
        argv += ["--temperature", "0.7", "--max-rows", "2", "--num-slots", "4", *extra]
        assert cli.main([*argv, "--out", str(out), "--responses", str(texts)]) == 0
        figures.append(json.loads(out.read_text())["suites"][0])
        responses.append(lines(texts))
    assert responses[0] == responses[1]
    assert len({row["response"] for row in responses[0]}) > 2
    plain, drafted = figures
    assert drafted["num_decode_steps"] < plain["num_decode_steps"]
    for name in ("pass@1", "pass@4", "pass@4_interval", "num_response_tokens"):
        assert plain[name] == drafted[name]
    assert plain["pass@4"] >= plain["pass@1"]


def test_greedy_samples_are_equal_and_suites_have_a_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("amc23", "gsm8k"):
        rows = [{"question": "7 7 =?", "answer": "14"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    responses = tmp_path / "responses.jsonl"
    argv = [
        "eval",
        "--model",
        str(model_dir()),
        "--suites",
        "amc-23,GSM8K",
        "--reward",
        "exact_match",
    ]
    argv += ["--data-dir", str(tmp_path), "--instruction", "", "--temperature", "0"]
    argv += ["--num-samples", "3", "--max-tokens", "5", "--responses", str(responses)]
    assert cli.main(argv) == 0
    texts = [row["response"] for row in lines(responses)]
    assert len(set(texts)) == 1
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["suite", "AMC23", "GSM8K", "mean"]
    assert table[3].split()[1] == "0.000"


def of_no_answer(prompt: str, response: str, answer: Any) -> float:
    assert answer is None
    return 1.0


def test_problems_may_have_no_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text(json.dumps({"prompt": "7 7 =?\n"}) + "\n")
    argv = ["eval", "--model", str(model_dir()), "--prompts", str(path), "--max-tokens", "3"]
    argv += ["--reward", f"{__name__}:of_no_answer"]
    assert cli.main(argv) == 2
    assert "'none' is for data without answers" in capsys.readouterr().err
    assert cli.main([*argv, "--answer-column", "none"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["open", "1", "1", "1.000"]


def anything(prompt: str, response: str, answer: Any) -> float:
    return float(isinstance(answer, Decimal))


def test_answers_of_any_kind_are_written(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    path, responses = tmp_path / "sums.parquet", tmp_path / "responses.jsonl"
    rows = [{"prompt": "7 7 =?\n", "answer": Decimal("14.5")}]
    parquet.write_table(pa.Table.from_pylist(rows), path)
    argv = ["eval", "--model", str(model_dir()), "--prompts", str(path), "--max-tokens", "3"]
    argv += ["--reward", f"{__name__}:anything", "--responses", str(responses)]
    assert cli.main(argv) == 0
    (row,) = lines(responses)
    assert (row["answer"], row["reward"]) == ("14.5", 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "eval: expected --suites, --prompts or --lm-eval, got none of them"),
        (["--suites", "AIME25"], "--suites: expected names of AMC23, AIME24"),
        (["--suites", "AIME25"], "got 'AIME25'; did you mean AIME24?"),
        (["--suites", "AMC23", "--data-dir", "nowhere"], "--data-dir: expected a folder"),
        (["--prompts", "{file}", "--num-samples", "0"], "--num-samples: expected at least 1"),
        (["--prompts", "{file}", "--temperature", "-1"], "--temperature: expected >= 0, got -1.0"),
        (["--prompts", "{file}", "--top-p", "0"], "--top-p: expected 0 < value <= 1, got 0.0"),
        (["--prompts", "{file}", "--pass-at", "1,x"], "--pass-at: expected numbers from 1 on"),
        (["--prompts", "{file}", "--pass-at", "2"], "--pass-at: expected at most the 1 samples"),
        (["--prompts", "{file}", "--confidence", "95"], "--confidence: expected between 0 and 1"),
        (["--prompts", "{file}", "--max-rows", "0"], "--max-rows: expected at least 1, got 0"),
        (["--prompts", "{file}", "--max-tokens", "600"], "--max-tokens: expected prompt and"),
        (["--prompts", "{file}", "--reward", "nobodys"], "error: --reward: expected"),
        (
            ["--prompts", "{file}", "--max-model-len", "5"],
            "room for a response in the --max-model-len of 5 tokens, got",
        ),
        (["--prompts", "{file}", "--system-prompt", "S"], "error: --system-prompt: expected"),
        (["--prompts", "{file}", "--model", "nowhere"], "error: --model: expected a folder"),
        (
            ["--prompts", "Minerva.jsonl", "--suites", "Minerva"],
            "--prompts: expected a file of another name",
        ),
        (["--prompts", "{file}", "--out", "{file}"], "--out: expected a file of its own"),
        (["--prompts", "{file}", "--set", "a.b=1"], "--set: expected --run RUNDIR"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    heldout: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = heldout.with_name("out.json")
    given = [option.replace("{file}", str(heldout)) for option in options]
    assert cli.main([*MODEL, "--out", str(out), *given]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--run: expected the folder of a run with config.toml"),
        (["--suites", "AMC23"], "--suites: expected to be left out with --run"),
        (["--max-tokens", "9"], "does (--set rollout.max_tokens=... changes the config), got 9"),
        (
            ["--top-p", "0.95"],
            "--top-p: expected to be left out with --run, which evaluates as its",
        ),
        (["--seed", "0"], "--seed: expected to be left out with --run"),
        (["--engine", "vllm"], "--engine: expected to be left out with --run"),
        (["--reward", "exact_match"], "--reward: expected to be left out with --run"),
        (["--raw-prompts"], "--raw-prompts: expected to be left out with --run"),
        (["--max-rows", "3"], "--max-rows: expected to be left out with --run"),
    ],
)
def test_mistakes_with_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["eval", "--run", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def gsm8k(folder: Path) -> list[str]:
    (folder / "gsm8k.jsonl").write_text('{"question": "7 7 =?", "answer": "14"}\n')
    argv = ["eval", "--model", str(model_dir()), "--suites", "GSM8K", "--reward", "exact_match"]
    return [*argv, "--data-dir", str(folder), "--instruction", "", "--max-tokens", "3"]


def test_a_benchmark_is_not_replaced_by_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = gsm8k(tmp_path)
    file = tmp_path / "gsm8k.jsonl"
    kept = file.read_bytes()
    for name in ("--out", "--responses"):
        assert cli.main([*argv, name, str(file)]) == 2
        error = capsys.readouterr().err
        assert f"{name}: expected a file of its own" in error
        assert "which --suites GSM8K reads" in error
    assert file.read_bytes() == kept


def test_figures_of_suites_are_written_if_lm_eval_fails_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such file")

    out = tmp_path / "out.json"
    argv = [*gsm8k(tmp_path), "--lm-eval", "t", "--out", str(out)]
    monkeypatch.setattr(command, "_checked_tasks", lambda *_: None)
    monkeypatch.setattr(command, "_harness", fails)
    with pytest.raises(RuntimeError, match="no such file"):
        command.run(parsed(argv))
    content = json.loads(out.read_text())
    assert [suite["suite"] for suite in content["suites"]] == ["GSM8K"]
    assert content["lm_eval"] is None


def test_what_lm_eval_needs_is_checked_before_anything_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = SimpleNamespace(parts={}, max_length=None)
    monkeypatch.setattr(command, "_checked_tasks", lambda *_: None)
    monkeypatch.setattr(eval_subject, "subject_of_model", lambda *_: subject)
    monkeypatch.setattr(command, "_sampled", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="--max-model-len: expected a number for lm-eval"):
        command.run(parsed([*gsm8k(tmp_path), "--lm-eval", "t"]))


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args(argv[1:])


def test_every_option_of_a_model_is_refused_with_a_run() -> None:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    names = {name for action in parser._actions for name in action.option_strings}
    others = {"-h", "--help", "--model", "--run", "--set", "--suites", "--prompts"}
    others |= {"--lm-eval", "--lm-eval-path", "--step", "--pass-at", "--confidence"}
    others |= {"--drafting", "--out", "--responses"}
    assert names - others == set(map(option, eval_subject._OF_THE_RUN))


def test_a_run_that_was_moved_with_its_store_and_room_for_tasks(
    tmp_path: Path, make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lmdb")
    config = make_config(rollout={"cache_store": "disk"}, train={"epochs": 1})
    run(config)
    moved = Path(config.log.run_dir).rename(tmp_path / "moved")
    real, lengths = components.make_engine, []

    def make_engine(rollout: Any, *args: Any, **kw: Any) -> Any:
        lengths.append(rollout.max_model_len)
        return real(rollout, *args, **kw)

    monkeypatch.setattr(components, "make_engine", make_engine)
    assert cli.main(["eval", "--run", str(moved)]) == 0
    # What is for lm-eval goes there.
    monkeypatch.setattr(command, "_checked_tasks", lambda *_: None)
    monkeypatch.setattr(command, "_harness", lambda *_: {})
    tasks = ["--lm-eval", "t", "--max-rows", "3", "--system-prompt", "S", "--raw-prompts"]
    assert cli.main(["eval", "--run", str(moved), *tasks]) == 0
    assert lengths == [None, 128]


def test_more_tokens_than_the_model_has_room_for_are_cut_with_a_note(
    heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "--model", str(model_dir()), "--reward", REWARD, "--prompts", str(heldout)]
    assert cli.main([*argv, "--max-rows", "1"]) == 0
    assert "note: responses end after 49" in capsys.readouterr().err
