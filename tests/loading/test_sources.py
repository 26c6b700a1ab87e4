"""Rows of files, of folders that `datasets` wrote, and of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spec_rollout.loading import hub
from spec_rollout.loading.data import DataError, read_rows
from spec_rollout.loading.sources import read_records

ROWS = [{"prompt": f"{i} +1", "answer": str(i + 1)} for i in range(4)]


@pytest.fixture
def datasets():
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


def test_a_folder_of_save_to_disk(datasets, tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    records = list(read_records(tmp_path / "saved", max_rows=3))
    assert records == [(f"{tmp_path}/saved:{i + 1}", ROWS[i]) for i in range(3)]
    with pytest.raises(
        DataError, match=r"expected no split of '.*saved', which has none, got 'test'"
    ):
        read_rows(f"{tmp_path}/saved@test")


def test_a_folder_with_splits(datasets, tmp_path):
    parts = {name: datasets.Dataset.from_list(ROWS[i:]) for i, name in enumerate(("test", "train"))}
    folder = tmp_path / "with@sign"
    datasets.DatasetDict(parts).save_to_disk(folder)
    assert [row.prompt for row in read_rows(folder)] == ["1 +1", "2 +1", "3 +1"]
    assert len(read_rows(f"{folder}@test")) == 4
    assert read_rows(f"{folder}@test")[1].source == f"{folder}@test:2"
    with pytest.raises(
        DataError, match=r"expected a split 'dev' in .*, got test, train \(FOLDER@SP"
    ):
        read_rows(f"{folder}@dev")
    datasets.DatasetDict({"only": parts["test"]}).save_to_disk(tmp_path / "one")
    assert len(read_rows(tmp_path / "one")) == 4


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(DataError, match=r"expected a \.jsonl or .*, found a folder at"):
        read_rows(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="is not a folder that datasets can read"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:openai/gsm8k", ("openai/gsm8k", None, None, "train")),
        ("hub:openai/gsm8k:main@test", ("openai/gsm8k", None, "main", "test")),
        ("hub:a/b@train[:10%]", ("a/b", None, None, "train[:10%]")),
        ("hub:a/b/c/d.parquet", ("a/b", "c/d.parquet", None, "train")),
        (
            hub.NAMED["deepmath-6k"],
            ("bensonbsliu/Spec-RL", "deepmath/train_sample_6144.parquet", None, "train"),
        ),
    ],
)
def test_names_of_the_hub(text, parts):
    assert hub.parse(text) == hub.HubSource(*parts)


@pytest.mark.parametrize("text", ["hub:", "hub:gsm8k", "hub:a//b", "hub:a/b/c.jsonl:main"])
def test_bad_names_of_the_hub(text):
    with pytest.raises(DataError, match=rf"data: expected .*, got '{text}'"):
        read_rows(text)


def test_what_is_asked_of_the_hub(datasets, monkeypatch):
    asked = []

    def load_dataset(name, subset, *, data_files, split):
        asked.append((name, subset, data_files, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("simplerl-8k")[2].source == "simplerl-8k:3"
    assert read_rows("hub:openai/gsm8k:main@test")[0].source == "hub:openai/gsm8k:main@test:1"
    assert asked == [
        ("bensonbsliu/Spec-RL", None, "simplerl_math_35/train_8192.parquet", "train"),
        ("openai/gsm8k", "main", None, "test"),
    ]


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("deepmath-6k").write_text("")
    with pytest.raises(
        DataError, match=r"expected a \.jsonl or \.parquet file, .*, got 'deepmath-6k'"
    ):
        read_rows("deepmath-6k")


def test_without_a_network_it_says_what_to_do(datasets, monkeypatch):
    # What datasets itself does where it is told that there is none.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError,
        match=r"expected to load 'deepmath-6k' from the Hugging Face hub "
        r"\('deepmath/train_sample_6144\.parquet' of 'bensonbsliu/Spec-RL'\), got .*Without a network",
    ):
        read_rows("deepmath-6k")


def test_without_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs datasets \(pip install .*datasets"):
        read_rows("hub:a/b")


def test_json_lines_of_another_name(tmp_path):
    for name in ("a.json", "b.ndjson"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        assert len(read_rows(tmp_path / name)) == 4
