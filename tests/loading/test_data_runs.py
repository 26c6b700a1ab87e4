"""Whole runs: what they say about their data at the start, and that a resumed one has the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from byte_tokenizer import CHATML, EOS, PAD, VOCAB_SIZE, byte_tokenizer

from spec_rollout.cli import main
from spec_rollout.config.sections import ConfigError
from spec_rollout.config.toml import load_config
from spec_rollout.loading import data
from spec_rollout.loading.data import DataError
from spec_rollout.train.checkpoint import CheckpointError
from spec_rollout.train.trainer import resume, run

DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHATML


@pytest.fixture(scope="module")
def dated_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template has the day in it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("dated")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(DATED).save_pretrained(folder)
    return folder


@pytest.fixture
def make_dated(make_config, dated_model):
    """Two epochs of two steps; every prompt has a draft in the second."""

    def make(**sections):
        base = {
            "model": {"path": str(dated_model)},
            "rollout": {"rule": "lenient"},
            "train": {"epochs": None, "max_steps": 2},
            "eval": {"num_train_prompts": 0},
        }
        for name, values in sections.items():
            base.setdefault(name, {}).update(values)
        return make_config(**base)

    return make


def rows_of(run_dir, name="metrics.jsonl"):
    return [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]


def test_a_run_keeps_the_day_on_which_its_prompts_were_rendered(make_dated, capsys):
    config = make_dated(data={"template_time": "2026-03-07T09:00:00"})
    run_dir = config.log.run_dir
    run(config)
    assert rows_of(run_dir, "samples.jsonl")[0]["prompt"].startswith("2026-03-07<|im_start|>")
    capsys.readouterr()
    resume(run_dir, ["train.max_steps=4"])
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert (
        len([note for note in notes if "data.template_time = '2026-03-07T09:00:00'" in note]) == 1
    )
    assert not [note for note in notes if "token ids" in note]
    rows = rows_of(run_dir)
    assert [row["num_drafts"] for row in rows] == [0, 0, 12, 12]
    samples = rows_of(run_dir, "samples.jsonl")
    assert {sample["prompt"][:10] for sample in samples} == {"2026-03-07"}


def test_the_time_is_kept_where_the_template_asks_for_it(make_dated, make_config, tmp_path):
    config = make_dated()
    run(config)
    kept = load_config(Path(config.log.run_dir) / "config.toml").data.template_time
    day = kept[:10]
    assert rows_of(config.log.run_dir, "samples.jsonl")[0]["prompt"].startswith(day)
    plain = make_config(train={"max_steps": 1}, log={"run_dir": str(tmp_path / "plain")})
    run(plain)
    assert "template_time" not in (tmp_path / "plain" / "config.toml").read_text()


def test_drafts_outlast_the_day(make_dated, capsys):
    config = make_dated(data={"template_time": "2026-03-07T09:00:00"})
    run(config)
    capsys.readouterr()
    resume(config.log.run_dir, ["train.max_steps=4", 'data.template_time="2026-03-08T09:00:00"'])
    assert "token ids are not those of the run's start" in capsys.readouterr().err
    assert [row["num_drafts"] for row in rows_of(config.log.run_dir)] == [0, 0, 12, 12]
    assert rows_of(config.log.run_dir, "samples.jsonl")[-1]["prompt"].startswith("2026-03-08")


def test_answers_that_changed_are_other_data(make_config, write_rows):
    config = make_config(train={"max_steps": 1})
    run(config)
    path = Path(config.data.path)
    text = path.read_text()
    path.write_text(text.replace('"answer": "1"', '"answer": "7"'))
    with pytest.raises(CheckpointError, match=r"data\.path: expected .* with their answers"):
        resume(config.log.run_dir, ["train.max_steps=2"])
    path.write_text(text)
    resume(config.log.run_dir, ["train.max_steps=2"])


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: {"a": [1, x]}])
def test_columns_that_no_other_process_could_recognise_are_refused(
    make_config, monkeypatch, wrapped
):
    """As `datasets` decodes sound: its objects show their address and nothing else."""

    def records(path, max_rows):
        for number, value in enumerate([None, object()], start=1):
            yield f"{path}:{number}", {"prompt": "1", "answer": "1", "sound": wrapped(value)}

    monkeypatch.setattr(data, "read_records", records)
    config = make_config(model={"path": "not even a model"}, data={"path": "sounds"})
    with pytest.raises(DataError, match=r"sounds:2: sound: expected .*, got .*<object object at"):
        run(config)
    assert not Path(config.log.run_dir).exists()


def test_another_system_prompt_makes_other_data(make_dated):
    config = make_dated()
    run(config)
    with pytest.raises(CheckpointError, match=r"data\.path: expected the prompts"):
        resume(config.log.run_dir, ["train.max_steps=4", "data.system_prompt=Add."])


def test_a_note_says_that_text_goes_through_the_template(make_dated, capsys):
    run(make_dated(data={"system_prompt": "Add."}, train={"max_steps": 1}))
    err = capsys.readouterr().err
    assert err.count("note: ") == 1
    assert "data.chat_template = false" in err
    assert "<|im_start|>system\\nAdd.<|im_end|>" in err


@pytest.mark.slow
def test_what_is_left_out_is_told_listed_and_counted(make_dated, write_rows, tmp_path, capsys):
    prompts = [{"prompt": n * "x", "answer": "1"} for n in (3, 40, 4, 5, 100)]
    config = make_dated(
        data={
            "path": str(write_rows(prompts, "mixed.jsonl")),
            "max_prompt_tokens": 60,
            "long_prompts": "drop",
            "chat_template": False,
        },
        rollout={"max_tokens": 100},
        eval={"path": str(write_rows(prompts[:2], "held.jsonl"))},
        train={"max_steps": 1},
    )
    run(config)
    err = capsys.readouterr().err
    assert (
        "mixed.jsonl: 2 of 5 rows are left out, as their prompts are too long: 1 longer than 28 "
        "tokens (the model), 1 longer than 60 tokens (data.max_prompt_tokens); the longest has 100"
    ) in err
    assert "held.jsonl: 1 of 2 rows are left out" in err
    rows = rows_of(config.log.run_dir, "dropped.jsonl")
    assert [(r["data"], r["num_tokens"], r["limited_by"]) for r in rows] == [
        ("train", 40, "the model"),
        ("train", 100, "data.max_prompt_tokens"),
        ("heldout", 40, "the model"),
    ]
    assert (
        "fit the model's 128 tokens, got 40 prompt tokens + rollout.max_tokens = 100"
        in rows[0]["reason"]
    )
    summary = json.loads((Path(config.log.run_dir) / "summary.json").read_text())
    assert (summary["num_prompts"], summary["num_dropped_prompts"]) == (3, 2)


@pytest.mark.parametrize(
    ("rows", "sections", "error", "message"),
    [
        ([{"prompt": "1"}], {}, DataError, r":1: expected a column .* or 'answer' .*'none' is for"),
        (
            [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": None}],
            {"reward": {"functions": ["exact_match"]}},
            DataError,
            r":2: reward exact_match: expected an answer that is text, .* got nothing \(null\)",
        ),
        (
            [{"prompt": "1", "answer": {"ground_truth": "72", "style": "rule-math_v2"}}],
            {"reward": {"functions": ["last_number"]}},
            DataError,
            r":1: reward last_number: .* a table with 'ground_truth', 'style' \(a dotted",
        ),
        (
            [{"prompt": "1", "answer": "1"}],
            {"data": {"answer_column": None}, "reward": {"functions": ["exact_match"]}},
            DataError,
            r":1: reward exact_match: .* got nothing \(null\)",
        ),
        (
            [{"prompt": "1", "answer": "1", "tests": []}],
            {"reward": {"functions": ["tests_of_it:f"]}},
            ConfigError,
            r"reward\.functions: cannot load",
        ),
        ([{"prompt": "1", "answer": "1"}], {"eval": {"path": "absent"}}, DataError, "'absent'"),
    ],
)
def test_mistakes_in_the_data_show_before_the_model_is_loaded(
    rows, sections, error, message, make_config, write_rows
):
    path = write_rows(rows, "bad.jsonl")
    base = {"model": {"path": "no-such-model"}, "data": {"path": str(path)}}
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    with pytest.raises(error, match=message):
        run(make_config(**base))


def test_the_rollout_command_renders_prompts_as_training_does(
    dated_model, write_rows, tmp_path, capsys
):
    def prompts(rows, *options):
        out = tmp_path / "out.jsonl"
        path = write_rows(rows, "prompts.jsonl")
        files = ["--model", str(dated_model), "--prompts", str(path), "--out", str(out)]
        sizes = ["--max-tokens", "2", "--device", "cpu"]
        assert main(["rollout", *files, *sizes, *options]) in (0, 2)
        error = capsys.readouterr().err
        return [row["prompt"] for row in rows_of(tmp_path, "out.jsonl")], error

    text = [{"prompt": "1+1?", "answer": "2"}]
    shown, err = prompts(text, "--system-prompt", "Add.")
    assert "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1?" in shown[0]
    assert "(--raw-prompts leaves them as they are)" in err
    assert prompts(text, "--raw-prompts")[0] == ["1+1?"]
    _, err = prompts(text, "--raw-prompts", "--system-prompt", "Add.")
    assert "--system-prompt: expected to be left out, as --raw-prompts is given" in err
    chat = [{"prompt": [{"role": "assistant", "content": "It is"}]}]
    assert "--continue-final-message" in prompts(chat)[1]
    assert prompts(chat, "--continue-final-message")[0][0].endswith("<|im_start|>assistant\nIt is")
