"""What lm-eval's tasks ask of a model, over our engine: against plain forwards of the model."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

from spec_rollout.acceptance import NoReuse
from spec_rollout.demo import model_dir
from spec_rollout.engines import TransformersEngine
from spec_rollout.evals import harness
from spec_rollout.evals.harness import EngineLM
from spec_rollout.rollout import RolloutSession


@pytest.fixture(scope="module")
def policy():
    from spec_rollout.config.sections import ModelConfig
    from spec_rollout.loading.policy import load_policy

    return load_policy(ModelConfig(str(model_dir()), device="cpu"))


@pytest.fixture(scope="module")
def model(policy) -> EngineLM:
    session = RolloutSession(TransformersEngine(policy.model), NoReuse(), reuse=False)
    return EngineLM(session, policy.tokenizer, stop_token_ids=policy.eos_token_ids, max_length=64)


def instances(*args) -> list:
    return [SimpleNamespace(args=arg) for arg in args]


def plain_loglikelihood(policy, context: str, continuation: str) -> tuple[float, bool]:
    """By one forward of the model."""
    ids = policy.tokenizer(context)["input_ids"]
    rest = policy.tokenizer(continuation)["input_ids"]
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids + rest])).logits[0, len(ids) - 1 : -1]
    given = logits.double().log_softmax(-1).gather(1, torch.tensor(rest)[:, None])
    return float(given.sum()), logits.argmax(-1).tolist() == rest


def test_loglikelihoods_are_those_of_a_plain_forward(policy, model) -> None:
    prompt = "3 +4 -2 =?\nbegin"  # lm-eval moves space at its end to what follows
    greedy = model.generate_until(instances((prompt, {"until": [], "max_gen_toks": 3})))[0]
    pairs = [
        (prompt, greedy),
        (prompt, "7"),
        (prompt, "12 +"),
        ("5 +1 =?\nfrom", greedy[:1]),
        ("5 +1 =?\nfrom", "9"),
    ]
    found = model.loglikelihood(instances(*pairs), disable_tqdm=True)
    wanted = [plain_loglikelihood(policy, *pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
    assert found[0][1]
    assert not all(is_greedy for _, is_greedy in found)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in wanted], abs=1e-4)


def test_the_default_dtype_does_not_matter(model, other_dtype) -> None:
    pairs = [("3 +4 -2 =?\nbegin", "7"), ("5 +1 =?\nfrom", "12 +")]
    expected = model.loglikelihood(instances(*pairs), disable_tqdm=True)
    with other_dtype():
        assert model.loglikelihood(instances(*pairs), disable_tqdm=True) == expected


def test_a_long_text_is_scored_in_windows(policy, model) -> None:
    text = "1 +2 -3 =?\n" * 10  # 110 tokens, of which the model is let see 64
    (found,) = model.loglikelihood_rolling(instances((text,)))
    ids = [model.prefix_token_id, *policy.tokenizer(text)["input_ids"]]
    with torch.no_grad():
        first = policy.model(torch.tensor([ids[:64]])).logits[0, :-1].double().log_softmax(-1)
        # The rest is the end of a window as long as the first.
        last = policy.model(torch.tensor([ids[-64:]])).logits[0, :-1].double().log_softmax(-1)
    rest = len(ids) - 64
    wanted = first.gather(1, torch.tensor(ids[1:64])[:, None]).sum()
    wanted += last[-rest:].gather(1, torch.tensor(ids[-rest:])[:, None]).sum()
    assert math.isclose(found, float(wanted), rel_tol=1e-5)


def test_responses_are_cut_at_stop_strings_and_bounded(model) -> None:
    prompt = "3 +4 -2 =?\n"
    asked = [
        (prompt, {"until": [], "max_gen_toks": 9}),
        (prompt, {"until": [" "], "max_gen_toks": 9}),
    ]
    whole, cut = model.generate_until(instances(*asked))
    assert len(whole) == 9
    assert cut == whole.partition(" ")[0]
    assert " " in whole
    with pytest.raises(ValueError, match=r"lm-eval: expected generation with .*, got num_beams"):
        model.generate_until(instances((prompt, {"until": [], "num_beams": 4})))
    with pytest.raises(ValueError, match=r"less than 64 tokens .*, got 64"):
        model.generate_until(instances((prompt, {"until": [], "max_gen_toks": 64})))


def test_a_task_that_there_is_not_is_named_before_anything_is_loaded(monkeypatch, capsys) -> None:
    from spec_rollout.cli import main

    known = SimpleNamespace(match_tasks=lambda names: [n for n in names if n == "arc_easy"])
    monkeypatch.setattr(harness, "TaskManager", lambda include_path: known)
    asked = ["--suites", "AMC23", "--data-dir", "nowhere", "--lm-eval", "arc_easy,arc_eazy"]
    assert main(["eval", "--model", "nowhere", *asked]) == 2
    assert "error: --lm-eval: expected tasks of lm-eval, got arc_eazy" in capsys.readouterr().err


@pytest.mark.slow
def test_a_task_of_ones_own_from_its_file_to_the_figures(policy, model, tmp_path, capsys) -> None:
    """Choices as in MMLU and texts as in IFEval, through lm-eval's own evaluation."""
    from spec_rollout.cli import main

    documents = [{"q": f"{n} +{n + 1} -2 =?\nbegin", "choices": ["7", "12 +", "x"], "gold": n % 3} for n in range(3, 9)]  # fmt: skip
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in documents))
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "sums.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
target_delimiter: ""
"""
    (tmp_path / "choose.yaml").write_text(
        f"task: own_choice\noutput_type: multiple_choice{shared}"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        f"task: own_text\noutput_type: generate_until{shared}"
        'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs: {until: [" "], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "figures.json"
    asked = ["--lm-eval", "own_choice,own_text", "--lm-eval-path", str(tmp_path)]
    status = main(
        ["eval", "--model", str(model_dir()), *asked, "--device", "cpu", "--out", str(out)]
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    found = json.loads(out.read_text())["lm_eval"]
    right = 0
    for doc in documents:
        scores = [plain_loglikelihood(policy, doc["q"], choice)[0] for choice in doc["choices"]]
        right += scores.index(max(scores)) == doc["gold"]
    assert found["own_choice"]["acc,none"] == pytest.approx(right / len(documents))
    texts = model.generate_until(
        instances(*((doc["q"], {"until": [" "], "max_gen_toks": 4}) for doc in documents))
    )
    equal = sum(text == doc["choices"][0] for text, doc in zip(texts, documents, strict=True))
    assert found["own_text"]["exact_match,none"] == pytest.approx(equal / len(documents))
