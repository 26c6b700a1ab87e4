"""Prompts: every bad row is named with file and line; the order is a function of seed and step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from spec_rollout.loading.data import DataError, PromptOrder, load_prompts


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def load(path, tokenizer, **options):
    return load_prompts(path, tokenizer, vocab_size=50, **options)


def test_text_and_ids(write_rows, tokenizer):
    path = write_rows(
        [
            {"prompt": "1 +2", "answer": "3", "level": 4},
            "",
            {"prompt": [3, 4, 5], "answer": None},
        ]
    )
    data = load(path, tokenizer)
    text, ids = data.rows
    assert tokenizer.decode(text.prompt_ids) == text.prompt == text.rendered == "1 +2"
    assert text.prompt_ids.dtype == np.int32
    assert (text.answer, text.columns, text.source) == ("3", {"level": 4}, f"{path}:1")
    assert ids.prompt_ids.tolist() == [3, 4, 5]
    assert ids.prompt == ids.rendered == tokenizer.decode([3, 4, 5])
    assert ids.answer is None
    assert ids.source == f"{path}:3"  # the empty line counts
    assert (text.messages, data.notes, data.template_time) == (None, (), None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "answer": ', "expected a JSON object, got"),
        ("[1, 2]", "expected a JSON object, got"),
        (
            '{"question": "x", "answer": 1}',
            "expected a column 'prompt', got columns 'question', 'answer'",
        ),
        ('{"prompt": "x"}', "expected a column 'answer', got columns 'prompt'"),
        ('{"prompt": 3, "answer": 1}', "prompt: expected text, a list of token ids or .* got 3"),
        ('{"prompt": "", "answer": 1}', "prompt: expected at least one token, got none from ''"),
        ('{"prompt": [], "answer": 1}', "prompt: expected at least one token, got none"),
        ('{"prompt": [1, -1], "answer": 1}', "prompt: expected token ids from 0 to 49, got -1"),
        ('{"prompt": [1, 50], "answer": 1}', "prompt: expected token ids from 0 to 49, got 50"),
        ('{"prompt": [true], "answer": 1}', "prompt: expected text, a list of token ids"),
        (
            '{"prompt": [{"role": "user"}, 3], "answer": 1}',
            "prompt: expected text, a list of token ids",
        ),
        (
            '{"prompt": [{"role": "user", "content": "x"}], "answer": 1}',
            "expected text, as the tokenizer has no chat template",
        ),
        (
            '{"prompt": "\\ud800", "answer": 1}',
            "prompt: expected text that the tokenizer takes, got",
        ),
        ('{"prompt": ' + 9999 * "[" + "}", "expected a JSON object, got .* recursion"),
        (
            '{"prompt": "x", "answer": 1, "tools": [{"name": "f"}]}',
            "column 'tools' is for the chat template, which the tokenizer does not have",
        ),
        ('{"prompt": "123456", "answer": 1}', "prompt: expected at most 5 tokens, got 6"),
    ],
)
def test_bad_rows_are_named_with_their_line(line, message, write_rows, tokenizer):
    path = write_rows([{"prompt": "1 +2", "answer": "3"}, line, {"prompt": "1", "answer": "1"}])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        load(path, tokenizer, max_prompt_tokens=5)


def test_a_tokenizer_larger_than_the_model_is_noticed(write_rows, tokenizer):
    path = write_rows([{"prompt": "1 +2", "answer": "3"}])
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: prompt: expected token ids below the model's 5"
    ):
        load_prompts(path, tokenizer, vocab_size=5)


def test_long_prompts_are_dropped_and_counted(write_rows, tokenizer):
    path = write_rows([{"prompt": "x" * n, "answer": n} for n in (3, 9, 4, 8)])
    data = load(path, tokenizer, max_prompt_tokens=4, long_prompts="drop")
    assert [row.answer for row in data.rows] == [3, 4]
    assert data.num_dropped == 2
    assert [(row.source, row.num_tokens, row.limit) for row in data.dropped] == [
        (f"{path}:2", 9, 4),
        (f"{path}:4", 8, 4),
    ]
    assert data.dropped[0].reason == f"{path}:2: prompt: expected at most 4 tokens, got 9"
    assert data.row_notes == (
        f"{path}: 2 of 4 rows are left out, as their prompts are too long: 2 longer than 4 tokens "
        "(data.max_prompt_tokens); the longest has 9 tokens",
    )
    with pytest.raises(DataError, match=r"at least one row in .*, got none, 4 dropped as too long"):
        load(path, tokenizer, max_prompt_tokens=2, long_prompts="drop")


def test_bad_paths(tmp_path, write_rows, tokenizer):
    with pytest.raises(DataError, match=r"found nothing at .*absent\.jsonl"):
        load(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(DataError, match="found a folder at"):
        load(tmp_path, tokenizer)
    with pytest.raises(
        DataError, match=r"expected a \.jsonl or \.parquet file, .*, got .*rows\.csv"
    ):
        load(write_rows(["a,b"], "rows.csv"), tokenizer)
    with pytest.raises(DataError, match=r"at least one row in .*, got none"):
        load(write_rows([]), tokenizer)
    broken = write_rows(["not parquet"], "rows.parquet")
    with pytest.raises(
        DataError, match=r"rows\.parquet' (is not a readable Parquet file|needs pyarrow)"
    ):
        load(broken, tokenizer)


def test_parquet_rows_equal_jsonl_rows(tmp_path, write_rows, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": f"{i} +1", "answer": str(i + 1), "level": i} for i in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    a = load(write_rows(rows), tokenizer)
    b = load(tmp_path / "rows.parquet", tokenizer)
    assert a.fingerprint == b.fingerprint
    assert [r.columns for r in b.rows] == [{"level": i} for i in range(5)]
    assert b.rows[3].source.endswith("rows.parquet:4")


def test_rows_and_columns_as_configured(write_rows, tokenizer):
    path = write_rows([{"q": "1", "a": 1}, {"q": "2", "a": 2}, "broken, but past max_rows"])
    data = load(path, tokenizer, prompt_column="q", answer_column=None, max_rows=2)
    assert [row.answer for row in data.rows] == [None, None]
    assert [row.columns for row in data.rows] == [{"q": "1", "a": 1}, {"q": "2", "a": 2}]


def test_a_name_with_a_dot_reaches_into_a_column(write_rows, tokenizer):
    row = {
        "data_source": "gsm8k",
        "prompt": {"text": "1 +2"},
        "reward_model": {"ground_truth": "3", "style": "rule"},
        "extra.index": 7,
    }
    path = write_rows([row])
    columns = {"prompt_column": "prompt.text", "answer_column": "reward_model.ground_truth"}
    (loaded,) = load(path, tokenizer, **columns).rows
    assert (loaded.prompt, loaded.answer) == ("1 +2", "3")
    assert loaded.columns == {
        "data_source": "gsm8k",
        "reward_model": {"ground_truth": "3", "style": "rule"},
        "extra.index": 7,
    }
    # A column that has this very name is meant.
    (loaded,) = load(path, tokenizer, prompt_column="prompt.text", answer_column="extra.index").rows
    assert loaded.answer == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reward.truth", "expected a column 'reward.truth', got columns 'prompt', 'reward_model'"),
        ("reward_model.truth", "got 'reward_model' with 'ground_truth', 'style'"),
        ("reward_model.style.x", "got 'reward_model.style' with 'rule'"),
    ],
)
def test_a_name_with_a_dot_that_leads_nowhere(name, message, write_rows, tokenizer):
    path = write_rows(
        [{"prompt": "1", "reward_model": {"ground_truth": "3", "style": "rule"}}], "r.jsonl"
    )
    with pytest.raises(DataError, match=rf"r\.jsonl:1: .*{message}"):
        load(path, tokenizer, answer_column=name)


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "note"),
    [
        ({"prompt": "1", "answer": "2", "solution": "3"}, "1", "2", None),
        # As TRL's files have it, and as verl's; what verl keeps under extra_info is not the answer.
        ({"prompt": "1", "solution": "3"}, "1", "3", "answers are from column 'solution' ("),
        (
            {
                "data_source": "openai/gsm8k",
                "prompt": "1",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"answer": "so 4", "question": "1"},
            },
            "1",
            "4",
            "answers are from column 'reward_model.ground_truth' (",
        ),
        (
            {"question": "5", "final_answer": 6},
            "5",
            6,
            "prompts are from column 'question' and answers are from column 'final_answer' (",
        ),
        (
            {"problem": "7", "question": "no", "answer": "8"},
            "7",
            "8",
            "prompts are from column 'pr",
        ),
    ],
)
def test_columns_are_recognised(row, prompt, answer, note, write_rows, tokenizer):
    path = write_rows([row])
    data = load(path, tokenizer)
    assert (data.rows[0].prompt, data.rows[0].answer) == (prompt, answer)
    if note is None:
        assert data.row_notes == ()
    else:
        assert data.row_notes[0].startswith(f"{path}: {note}")
    # Named or recognised, they are the same data.
    names = {"prompt_column": next(iter(n for n in ("prompt", "problem", "question") if n in row))}
    if "reward_model" not in row:
        names["answer_column"] = next(n for n in ("answer", "final_answer", "solution") if n in row)
    else:
        names["answer_column"] = "reward_model.ground_truth"
    named = load(path, tokenizer, **names)
    assert named.fingerprint == data.fingerprint
    assert named.row_notes == ()


def test_the_first_row_says_which_columns(write_rows, tokenizer):
    path = write_rows([{"prompt": "1", "solution": "2"}, {"prompt": "1", "answer": "2"}])
    with pytest.raises(
        DataError, match=r":2: expected a column 'solution', got columns 'prompt', '"
    ):
        load(path, tokenizer)
    path = write_rows([{"text": "1", "answer": "2"}])
    with pytest.raises(
        DataError,
        match=r":1: expected a column 'prompt' or .*'question', got columns 'text', 'answer' "
        r"\(data\.prompt_column names another\)",
    ):
        load(path, tokenizer)


def test_columns_that_rewards_have_other_names_for(write_rows, tokenizer):
    path = write_rows([{"prompt": "1", "answer": "a", "solution": "s", "response": "r", "n": 1}])
    (row,) = load(path, tokenizer, answer_column="solution").rows
    assert row.answer == "s"
    assert row.columns == {"solution": "s", "n": 1}
    (row,) = load(path, tokenizer).rows
    assert row.answer == "a"
    assert row.columns == {"solution": "s", "n": 1}


def test_equal_prompts_get_keys_of_their_own(write_rows, tokenizer):
    prompts = ["1", "2", "1", "1"]
    data = load(write_rows([{"prompt": p, "answer": 0} for p in prompts]), tokenizer)
    assert [row.user_key for row in data.rows] == ["", "", "1", "2"]


def test_each_row_once_per_epoch_in_another_order():
    order = PromptOrder(10, 4, seed=3)
    assert order.steps_per_epoch == 3
    epochs = []
    for epoch in range(3):
        steps = [order.rows_of(3 * epoch + i) for i in range(3)]
        assert [len(s) for s in steps] == [4, 4, 2]
        assert [order.epoch_of(3 * epoch + i) for i in range(3)] == [epoch] * 3
        epochs.append([row for s in steps for row in s])
        assert sorted(epochs[-1]) == list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_step_alone():
    a, b, c = (PromptOrder(50, 8, seed=seed) for seed in (1, 1, 2))
    assert a.rows_of(9) == b.rows_of(9)
    assert [a.rows_of(i) for i in range(7)] != [c.rows_of(i) for i in range(7)]
    assert PromptOrder(5, 2, seed=1, shuffle=False).rows_of(4) == [2, 3]
    assert json.dumps(a.rows_of(0))  # plain ints


def test_data_is_shuffled_once_an_epoch(monkeypatch):
    made, real = [], np.random.default_rng

    def generator(seed):
        made.append(seed)
        return real(seed)

    monkeypatch.setattr(np.random, "default_rng", generator)
    order = PromptOrder(10, 4, seed=3)
    for step in [0, 1, 2, 2, 3, 4, 5]:
        order.rows_of(step)
    assert made == [(3, 0), (3, 1)]
