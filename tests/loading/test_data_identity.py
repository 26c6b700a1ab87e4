"""What makes data the same data, and a row the same row."""

from __future__ import annotations

import numpy as np
import pytest
from byte_tokenizer import CHATML, VOCAB_SIZE, byte_tokenizer

from spec_rollout.loading.data import load_prompts
from spec_rollout.loading.records import canonical

DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
DAYS = ("2026-03-07T09:00:00", "2026-03-08T09:00:00")


@pytest.fixture
def load(write_rows):
    def load(rows, *, tokenizer=None, **options):
        tokenizer = tokenizer or byte_tokenizer()
        return load_prompts(write_rows(rows), tokenizer, vocab_size=VOCAB_SIZE, **options)

    return load


def row(prompt, answer="0", **columns):
    return {"prompt": prompt, "answer": answer, **columns}


def test_the_fingerprint_tells_data_apart(load):
    different = [
        [row("12"), row("3")],
        [row("1"), row("23")],  # the same tokens, other borders
        [row("3"), row("12")],
        [row("12"), row("3", answer="1")],
        [row("12"), row("3", answer=0)],
        [row("12"), row("3", level=1)],
        [row("12"), row("3"), row("3")],
    ]
    fingerprints = [load(rows).fingerprint for rows in different]
    assert len(set(fingerprints)) == len(different)
    assert load(different[0]).fingerprint == fingerprints[0]
    in_another_order = [{"answer": "0", "prompt": "12"}, {"answer": "0", "prompt": "3"}]
    assert load(in_another_order).fingerprint == fingerprints[0]


def test_a_null_is_as_good_as_no_column(load):
    # A Parquet file has every key in every row.
    assert (
        load([row("1", level=None, extra={"a": 1, "b": None})]).fingerprint
        == load([row("1", extra={"a": 1})]).fingerprint
    )


def test_settings_that_make_other_prompts_are_part_of_the_fingerprint(load):
    rows, tokenizer = [row("1")], byte_tokenizer(CHATML)
    prints = {
        load(rows, tokenizer=tokenizer, **options).fingerprint
        for options in (
            {},
            {"chat_template": False},
            {"system_prompt": "Add."},
            {"answer_column": None},
        )
    }
    assert len(prints) == 4


def test_tomorrows_data_is_todays(load):
    rows = [row("1"), row("2"), row("1"), row([{"role": "user", "content": "1"}])]
    first, second = (load(rows, tokenizer=byte_tokenizer(DATED), template_time=day) for day in DAYS)
    assert first.rows[0].rendered.startswith("2026-03-07<")
    assert second.rows[0].rendered.startswith("2026-03-08<")
    assert first.fingerprint == second.fingerprint
    assert first.rendering != second.rendering
    assert [r.user_key for r in first.rows] == [r.user_key for r in second.rows]
    # Equal prompts have keys of their own, the text as a message included.
    assert len({r.user_key for r in first.rows}) == 4


def test_rows_that_the_template_is_given_other_things_for_are_other_rows(load):
    def key(row, **options):
        return load([row], tokenizer=byte_tokenizer(CHATML), **options).rows[0].user_key

    user = {"role": "user", "content": "1"}
    others = [
        key(row("1")),
        key(row("2")),
        key(row("1", tools=[{"name": "f"}])),
        key(row("1", chat_template_kwargs={"enable_thinking": False})),
        key(row("1"), system_prompt="Add."),
        key(row([user, {**user, "role": "assistant"}]), continue_final_message=True),
    ]
    assert len(set(others)) == len(others)
    # What the template does not see is not part of the prompt: its rollouts stay of use.
    assert key(row("1", answer="7", level=3)) == others[0]
    assert key(row([user])) == others[0]


def test_images_are_the_same_in_every_process(tmp_path):
    datasets, image = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    datasets.disable_progress_bars()

    def fingerprint(colour, name):
        picture = image.new("RGB", (2, 3), (1, 2, colour))
        rows = datasets.Dataset.from_list([row("1"), row("2")]).add_column("n", [1, 2])
        features = datasets.Features({**rows.features, "image": datasets.Image()})
        rows = rows.map(lambda _: {"image": picture}, features=features)
        rows.save_to_disk(tmp_path / name)
        loaded = [
            load_prompts(tmp_path / name, byte_tokenizer(), vocab_size=VOCAB_SIZE) for _ in "ab"
        ]
        assert loaded[0].rows[0].columns["image"] is not loaded[1].rows[0].columns["image"]
        assert loaded[0].fingerprint == loaded[1].fingerprint
        return loaded[0].fingerprint

    assert fingerprint(3, "a") != fingerprint(4, "b")


def test_arrays_are_told_apart_by_all_their_numbers():
    arrays = [np.zeros(5000), np.zeros(5000), np.zeros((50, 100)), np.zeros(5000, np.float32)]
    arrays[1][2500] = 1.0  # not in what is printed of it
    assert len({canonical({"a": array}) for array in arrays}) == 4
    assert canonical({"a": arrays[0]}) == canonical({"a": np.zeros(5000)})


def test_raw_prompts_are_identified_by_their_tokens(load):
    # As anybody who calls the rollout session with token ids identifies them.
    assert [r.user_key for r in load([row("1"), row([49]), row("2")]).rows] == ["", "1", ""]


def test_rows_of_a_parquet_file_are_those_of_the_json_file(load, tmp_path, write_rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    user = {"role": "user", "content": "1+1?"}
    # As verl writes them; the keys of one row become keys of all, with nulls.
    rows = [
        {
            "prompt": [{**user, "name": "ann"}],
            "reward_model": {"ground_truth": "2", "style": "rule-math_v2"},
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "prompt": [{"role": "system", "content": "Add."}, user],
            "reward_model": {"ground_truth": "2"},
        },
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    options = {"vocab_size": VOCAB_SIZE, "answer_column": "reward_model.ground_truth"}
    tokenizer = byte_tokenizer(CHATML)
    a = load_prompts(write_rows(rows), tokenizer, **options)
    b = load_prompts(tmp_path / "rows.parquet", tokenizer, **options)
    assert [r.rendered for r in b.rows] == [r.rendered for r in a.rows]
    assert "<think></think>" in a.rows[0].rendered
    assert "None" not in a.rows[0].rendered + a.rows[1].rendered
    assert [r.user_key for r in b.rows] == [r.user_key for r in a.rows]
    assert (b.fingerprint, b.rendering) == (a.fingerprint, a.rendering)
    assert [r.answer for r in b.rows] == ["2", "2"]
