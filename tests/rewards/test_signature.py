"""What a function takes is read from the names of its parameters."""

from __future__ import annotations

import functools

import pytest

from spec_rollout.rewards.run_context import Progress, RunContext
from spec_rollout.rewards.signature import Sample, SignatureError, signature_of

COLUMNS = {"level": 3, "tests": ["t"], "solution": "4"}
SAMPLE = Sample("P", "R", "A", COLUMNS, "d.jsonl:1", [1, 2])
OTHER = Sample("p", "r", "a", {"level": 5, "tests": [], "solution": "5"}, "d.jsonl:2", [3])


def called(function, *samples, columns=frozenset(COLUMNS)):
    signature = signature_of(function, columns)
    return signature.call(function, samples or [SAMPLE])


def by_keyword(prompt, response, answer, **columns):
    return prompt, response, answer, columns


def by_place(question, output, gold):
    return question, output, gold


def in_another_order(answer, response):
    return answer, response


def with_columns(prompt, response, answer, level, scale=10):
    return prompt, response, answer, level, scale


def column_in_third_place(prompt, response, solution):
    return prompt, response, solution


def only_names(*, response, level):
    return response, level


def by_position_only(prompt, response, answer, /, level=None):
    return prompt, response, answer, level


def with_defaults(prompt, response=None, answer=None, level=1):
    return prompt, response, answer, level


def with_setting(prompt, response, *, threshold=0.5):
    return prompt, response, threshold


def response_ids(response_ids, response):
    return response_ids, response


def star(*args):
    return args


class Method:
    def reward(self, prompt, response, answer):
        return prompt, response, answer

    def __call__(self, response, level=0):
        return response, level


@pytest.mark.parametrize(
    ("function", "result"),
    [
        (by_keyword, ("P", "R", "A", COLUMNS)),
        (by_place, ("P", "R", "A")),
        (in_another_order, ("A", "R")),
        (with_columns, ("P", "R", "A", 3, 10)),
        (column_in_third_place, ("P", "R", "4")),
        (only_names, ("R", 3)),
        (by_position_only, ("P", "R", "A", 3)),
        (with_defaults, ("P", "R", "A", 3)),
        (with_setting, ("P", "R", 0.5)),
        (response_ids, ([1, 2], "R")),
        (star, ("P", "R", "A")),
        (Method().reward, ("P", "R", "A")),
        (Method(), ("R", 3)),
        (functools.partial(with_columns, scale=2), ("P", "R", "A", 3, 2)),
        (lambda a, b, c: (a, b, c), ("P", "R", "A")),
    ],
)
def test_one_response_a_call(function, result):
    assert called(function) == result


def test_a_builtin_without_a_signature_gets_the_three():
    assert called(min) == "A"


def own(prompts, responses, answers, level, **columns):
    return prompts, responses, answers, level, columns


def trl(prompts, completions, completion_ids, solution, **kwargs):
    return prompts, completions, completion_ids, solution, kwargs


def trl_short(completions, **kwargs):
    return completions, sorted(kwargs)


def test_all_responses_at_once():
    assert called(own, SAMPLE, OTHER) == (
        ["P", "p"],
        ["R", "r"],
        ["A", "a"],
        [3, 5],
        {"tests": [["t"], []], "solution": ["4", "5"]},
    )
    assert called(own, SAMPLE)[3] == [3]


def test_functions_for_trl():
    prompts, completions, ids, solution, rest = called(trl, SAMPLE, OTHER)
    assert (prompts, completions, ids) == (["P", "p"], ["R", "r"], [[1, 2], [3]])
    assert solution == ["4", "5"]
    # TRL hands on every column, the answer's too, and what a function may ask of the trainer.
    of_run = {name: rest.pop(name) for name in ("trainer_state", "log_extra", "log_metric")}
    assert of_run["trainer_state"].global_step == 0
    assert rest == {"level": [3, 5], "tests": [["t"], []], "answer": ["A", "a"]}
    assert called(trl_short, SAMPLE)[1] == sorted([*of_run, *COLUMNS, "answer"])


def test_a_column_with_the_name_of_what_is_given_by_position_is_left_out():
    columns = dict.fromkeys(("answers", "completions", "response_ids", "level"), "?")
    sample = Sample("P", "R", "A", columns, "d.jsonl:1", [1, 2])

    def of_lists(prompts, responses, answers, **columns):
        return prompts, responses, answers, sorted(columns)

    def of_trl(prompts, completions, **kwargs):
        return prompts, completions, kwargs["level"], kwargs["answers"], "completions" in kwargs

    def of_one(response_ids, response, **columns):
        return response_ids, response, sorted(columns)

    def by_position_only(prompts, responses, answers, /, **columns):
        return answers, columns["answers"]

    assert called(of_lists, sample, columns=columns) == (
        ["P"], ["R"], ["A"], ["completions", "level", "response_ids"],
    )  # fmt: skip
    assert called(of_trl, sample, columns=columns) == (["P"], ["R"], ["?"], ["?"], False)
    assert called(of_one, sample, columns=columns) == (
        [1, 2], "R", ["answers", "completions", "level"],
    )  # fmt: skip
    # No name could be given twice.
    assert called(by_position_only, sample, columns=columns) == (["A"], ["?"])
    # Which columns there are may not be known before the call.
    signature = signature_of(by_keyword, None)
    assert signature.call(by_keyword, [Sample("P", "R", "A", {"prompt": "?", "level": 3})])[3] == {
        "level": 3
    }


def test_what_functions_for_trl_ask_of_the_trainer_and_tell_it():
    def asks(completions, trainer_state, log_metric, log_extra, answer):
        log_extra("lengths", [len(c) for c in completions])
        log_metric("share", 0.25)
        log_metric("share", trainer_state.global_step / trainer_state.max_steps)
        return answer

    context = RunContext(Progress(3, 4, 1.0))
    signature = signature_of(asks, COLUMNS)
    assert signature.call(asks, [SAMPLE, OTHER], context) == ["A", "a"]
    assert context.logged == {"share": [0.25, 0.75]}
    # A column of that name is a column.
    signature = signature_of(asks, {"trainer_state"})
    sample = Sample("P", "R", "A", {"trainer_state": None})
    with pytest.raises(AttributeError, match="'list' object has no attribute 'global_step'"):
        signature.call(asks, [sample])


def test_functions_for_trl_get_messages_where_the_rows_hold_messages():
    messages = [{"role": "user", "content": "2+2?"}]
    sample = Sample("rendered", "R", "A", COLUMNS, "d:1", [1], messages)
    prompts, completions, *_ = called(trl, sample, SAMPLE)
    assert prompts == [messages, "P"]
    assert completions == [[{"role": "assistant", "content": "R"}], "R"]
    # Others get text.
    assert called(own, sample)[:2] == (["rendered"], ["R"])
    assert called(by_place, sample) == ("rendered", "R", "A")


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return data_source, solution_str, ground_truth, extra_info


def test_functions_for_verl():
    columns = {"data_source": "gsm8k", "ground_truth": "?"}
    sample = Sample("P", "R", "A", columns)
    assert called(compute_score, sample, columns=columns) == ("gsm8k", "R", "A", {})
    sample = Sample("P", "R", "A", {**columns, "extra_info": {"index": 1}})
    assert called(compute_score, sample, columns=sample.columns)[3] == {"index": 1}
    assert signature_of(compute_score, columns).scores
    with pytest.raises(SignatureError, match="got 'data_source'"):
        called(compute_score)

    def strict(data_source, solution_str, ground_truth, extra_info, **kwargs):
        return data_source, extra_info, kwargs

    # verl's keywords are not columns.
    assert called(strict, sample, columns=sample.columns) == ("gsm8k", {"index": 1}, {})


def test_functions_for_verls_batches():
    def batch(data_sources, solution_strs, ground_truths, extra_infos):
        return data_sources, solution_strs, ground_truths, extra_infos

    columns = {"data_source": "gsm8k"}
    samples = [
        Sample("P", "R", "A", columns),
        Sample("p", "r", "a", {**columns, "extra_info": {"i": 1}}),
    ]
    assert called(batch, *samples, columns=columns) == (
        ["gsm8k", "gsm8k"],
        ["R", "r"],
        ["A", "a"],
        [{}, {"i": 1}],
    )
    with pytest.raises(SignatureError, match="got 'data_sources'"):
        signature_of(batch, COLUMNS)


def needs_more(prompt, response, answer, tests, timeout):
    pass


def two_strangers(text, gold):
    pass


def response_and_stranger(response, gold):
    pass


def response_in_another_place(level, text, gold, response):
    pass


def stranger_by_position(prompt, response, answer, gold, /):
    pass


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (needs_more, "timeout"),
        (two_strangers, "text"),
        (response_and_stranger, "gold"),
        (response_in_another_place, "text"),
        (stranger_by_position, "gold"),
    ],
)
def test_what_there_is_not_is_named(function, name):
    with pytest.raises(
        SignatureError,
        match=rf"expected .* columns of the data \('level', 'solution', 'tests'\), got '{name}'",
    ):
        signature_of(function, COLUMNS)


def test_a_setting_is_not_taken_for_the_answer():
    def by_length(prompt, response, longest=100):
        return len(response) <= longest

    with pytest.raises(SignatureError, match=r"'answer', .* parameter 3, got 'longest=100'"):
        signature_of(by_length, COLUMNS)
    assert called(by_length, Sample("P", "R", "A", {"longest": 0}), columns={"longest"}) is False


def test_columns_that_a_function_needs():
    assert signature_of(with_columns, COLUMNS).required == {"level"}
    assert signature_of(with_columns, None).required == {"level"}
    assert signature_of(by_keyword, COLUMNS).required == set()


def test_what_a_function_changes_is_its_own():
    def pops(prompt, response, answer, tests):
        answer.append(tests.pop())
        return len(answer)

    sample = Sample("P", "R", ["a"], {"tests": ["t"]})
    signature = signature_of(pops, sample.columns)
    assert [signature.call(pops, [sample]) for _ in range(3)] == [2, 2, 2]
    assert (sample.answer, sample.columns) == (["a"], {"tests": ["t"]})
