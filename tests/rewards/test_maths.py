"""Mathematical answers: what a response states, what is equal, and that nothing hangs or dies."""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from spec_rollout.config.sections import ConfigError, RewardConfig
from spec_rollout.rewards import Rewards, Sample, maths
from spec_rollout.rewards.maths import Grade, grade_answers
from spec_rollout.rewards.maths_worker import last_boxed, plain, stated

# Python computes it in one call, in all the memory there is.
ENDLESS = r"\boxed{9^{9^{9^{9}}}}"

MATRIX = "Thus \\[\\boxed{\n\\begin{pmatrix}\n1 & 2 \\\\\n3 & 4\n\\end{pmatrix}\n}\\]"
CASES = "\\boxed{\\begin{cases}\nx & x > 0 \\\\\n-x & x \\le 0\n\\end{cases}}"
ALIGNED = "\\boxed{\\begin{aligned}\nx &= 1 \\\\\ny &= 2\n\\end{aligned}}"


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} then \boxed {2}.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} for sure", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{1} but not \boxed{2", "1"),
        (r"\boxed{", None),
        ("5", None),
        (r"\boxed{" * 5000, None),
    ],
)
def test_the_last_closed_box(text, boxed):
    assert last_boxed(text) == boxed


def test_a_response_states_its_box_or_last_line_or_end():
    assert stated("#### 7\n" + r"\boxed{8}") == ("8", True)
    assert stated("6 x 7\n#### 41\n#### 42\nbye") == ("42", True)
    assert stated("####\nno") == ("####\nno", False)
    for line in ("42 dollars", r"\frac{1}{2}", "$x = 3$", "1.5 km", "-7", "(C)"):
        assert stated(f"6 x 7\n#### {line}\nbye") == (line, True)
    # A heading, as markdown has it, only where there is something below it.
    for line in ("Step 4: Add up", "Solution", "**Answer**", "2. Add up", "**3) *So***", "答案"):
        text = f"#### {line}\n9 * 2 = 18.\nThe answer is 18."
        assert stated(text) == (text, False)
        assert stated(f"#### {line}\n \n") == (line, True)
    assert stated("a" * 5000 + "12")[0][-3:] == "a12"
    assert len(stated("a" * 5000)[0]) == 2000


def test_what_makes_no_difference():
    assert plain(r"\left( 3, \dfrac{\pi}{2} \right)") == plain(r"(3,\frac{\pi}{2})")
    assert plain(r"\text{Evelyn}.") == "Evelyn"
    assert plain(r"\$32,\!348") == "32,348"
    assert plain(r"10\,000") == "10000"
    assert plain("3 1/2") == plain(r"3\;1/2") != plain("31/2")
    # The end of a row is no space, and an arrow no bracket.
    rows = r"\begin{pmatrix}1\\2\end{pmatrix}"
    assert plain(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}") == rows
    assert plain(r"\begin{pmatrix}1 \\\, 2\end{pmatrix}") == rows
    assert plain(r"a \leftarrow \left[ b \right]") == r"a\leftarrow[b]"
    assert plain(r"a \rightarrow b") != plain(r"a \leftarrow b") != plain("a arrow b")


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"hence \boxed{\frac{1}{2}}", "0.5", True),
        (r"hence $\boxed{\dfrac12}$.", r"\frac{1}{2}", True),
        (r"\boxed{1/3}", r"\frac{1}{3}", True),
        (r"\boxed{0.33}", r"\frac{1}{3}", False),
        (r"The final answer is $2\sqrt{3}$.", r"\sqrt{12}", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{(2, 1)}", "(1,2)", False),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", True),
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{10,000}", "10000", True),
        (r"\boxed{6}", r"\$6", True),
        ("She has 18 ducks.", "Janet sells 9.\n#### 18", True),
        ("3 + 4 = 7\n#### 7", 7, True),
        ("#### Step 4: Add up\n9*2 = 18.\nThe answer is 18.", 18, True),
        ("#### Answer: 18\nShe sells 9.", 18, True),
        ("18", "#### 2. Add up\n9*2 = 18.\nThe answer is 18.", True),
        ("it is -3", -3.0, True),
        ("it is 0.25", Decimal("0.25"), True),
        (r"\boxed{7} is wrong, \boxed{8}", 7, False),
        (r"\boxed{\text{(C)}}", "(C)", True),
        (r"\boxed{B}", "(C)", False),
        (r"\boxed{north}", "south", False),
        ("", "1", False),
        ("no idea", "1", False),
        ("1", ["2", 1], True),
        ("1", ["2", "3"], False),
        # Where an answer is stated, and where only the word is.
        ("To answer this, take her 9 eggs a day. She makes 18 dollars.", 18, True),
        ("To answer this, take her 9 eggs a day. She makes 18 dollars.", 9, False),
        ("The answer is not 9 but 18.", 18, True),
        ("The answer is not 9 but 18.", 9, False),
        ("The answer cannot be 9, so we get 18", 18, True),
        ("We answered with 9 before. It is 18.", 18, True),
        ("The answer is 18. (She has 9 eggs left.)", 18, True),
        ("The answers are: 18. Not 9.", 18, True),
        ("**Answer**: 18 dollars, of 9 eggs", 18, True),
        ("Answer\n18\nfor 9 eggs", 18, True),
        ("The answer is 9. No, the answer is 18. She has 7 left.", 18, True),
        ("Answer: 18. The answer is 9.", 18, True),
        (r"The answer is $18$, for $9$ eggs.", 18, True),
        ("The answer is 9 * 2 = 18, for 7 eggs", 18, True),
        (r"She makes \$18.", 18, True),
        # Solutions of one line, and answers that are none.
        (r"\boxed{18}", "She sells 9 * 2 = 18 dollars", True),
        (r"\boxed{18}", "To answer this, take 9 eggs; she makes 18 dollars", True),
        (r"\boxed{2\sqrt{3}}", r"Of 7 halves the area is \(\sqrt{12}\)", True),
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3} \text{ square units}", True),
        (r"\boxed{18}", "18 square units", True),
        (r"\boxed{3 1/2}", "31/2", False),
        (r"\boxed{1 2}", "12", False),
        (r"\boxed{10 000}", "10000", True),
        # Over several lines.
        ("\\boxed{\n5\n}", "5", True),
        ("\\boxed{x = 7,\n y = 2}", "2", False),
        (MATRIX, r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
        (MATRIX, r"\left( \begin{array}{cc} 1 & 4/2 \\ 3 & 4 \end{array} \right)", True),
        (MATRIX, r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}", False),
        (MATRIX, r"\begin{pmatrix} 9 & 2 \\ 3 & 4 \end{pmatrix}", False),
        (MATRIX, "4", False),
        (MATRIX, MATRIX, True),
        (MATRIX, "\\begin{pmatrix}\n1 & 2 \\\\\n3 & \\frac{8}{2}\n\\end{pmatrix}\n", True),
        (MATRIX, "\\begin{pmatrix}\n9 & 2 \\\\\n3 & 4\n\\end{pmatrix}\n", False),
        (r"\boxed{4}", "\\begin{pmatrix}\n9 & 2 \\\\\n3 & 4\n\\end{pmatrix}\n", False),
        (CASES, r"\begin{cases} x & x > 0 \\ -x & x \le 0 \end{cases}", True),
        (CASES, r"\begin{cases} x & x > 0 \\ x & x \le 0 \end{cases}", False),
        (CASES, "0", False),
        (ALIGNED, r"\begin{aligned} x &= 1 \\ y &= 2 \end{aligned}", True),
        (ALIGNED, r"\begin{aligned} x &= 3 \\ y &= 2 \end{aligned}", False),
        (ALIGNED, "2", False),
        (r"\boxed{a \leftarrow b}", r"a\leftarrow b", True),
        (r"\boxed{a \leftarrow b}", r"a \rightarrow b", False),
        (r"\boxed{a \rightarrow b}", r"a \leftarrow b", False),
        # Floats, whose text may have an exponent.
        (r"\boxed{0.00001}", 1e-05, True),
        (r"\boxed{10^{-5}}", 1e-05, True),
        (r"\boxed{0.00002}", 1e-05, False),
        (r"\boxed{0.0000001}", 1e-07, True),
        (r"\boxed{-0.0000001}", -1e-07, True),
        (r"\boxed{10^{16}}", 1e16, True),
        (r"\boxed{10^{23}}", 1e23, True),
        (r"\boxed{123456789012345680}", 123456789012345680.0, True),
        (r"\boxed{123456789012345681}", 123456789012345680.0, False),
        (r"\boxed{100}", 100.0, True),
        (r"\boxed{0}", -0.0, True),
    ],
)
def test_equal_answers(response, answer, correct):
    assert grade_answers([response], [answer]) == [Grade(correct)]


def test_answers_are_graded_one_by_one():
    responses = [rf"\boxed{{{i}}}" for i in range(40)]
    answers = [i + (i % 3 == 0) for i in range(40)]
    assert [g.correct for g in grade_answers(responses, answers)] == [i % 3 != 0 for i in range(40)]
    assert grade_answers([], []) == []
    with pytest.raises(ValueError, match=r"answers: expected one per response \(1\), got 2"):
        grade_answers(["1"], [1, 2])


def test_an_answer_that_cannot_be_computed_is_wrong_and_counted():
    # Before and after it, in the same process, others are judged as ever.
    responses = ["1", ENDLESS, "2", ENDLESS, "3"]
    grades = grade_answers(responses, [1, 5, 2, 5, 3], seconds=0.5)
    wrong = Grade(False, out_of_time=True)
    assert grades == [Grade(True), wrong, Grade(True), wrong, Grade(True)]


def test_the_time_limit_holds_in_python_code_too():
    # A sum of very many terms that sympy goes through one by one.
    slow = r"\boxed{\int_0^1 \frac{\sin(x^{17}) e^{x^x}}{\ln(x + \cos x^5)} dx}"
    (grade,) = grade_answers([slow], [r"\int_0^1 \frac{\cos(x^{13})}{x^{x}} dx"], seconds=0.3)
    assert not grade.correct


@pytest.mark.slow
def test_any_thread_may_ask_and_no_signal_is_touched():
    handler = signal.getsignal(signal.SIGALRM)
    seen: list[list[Grade]] = []

    def ask():
        seen.append(grade_answers(["1", ENDLESS], [1, 2], seconds=0.5))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert seen == 3 * [[Grade(True), Grade(False, out_of_time=True)]]
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.slow
def test_a_process_that_was_killed_is_replaced():
    grade_answers(["1"], [1])
    for worker in maths._pool()._workers:
        if worker is not None:
            worker._process.kill()
            worker._process.wait()
    assert grade_answers(["1", "2"], [1, 2]) == [Grade(True), Grade(True)]


@pytest.mark.slow
def test_what_models_say():
    """Anything at all gives a grade, and soon."""
    junk = [
        "\x00\ud800\U0001f600 \\boxed{\ud800}",
        "\\boxed{" + "(" * 3000 + ")" * 3000 + "}",
        "\\boxed{" + "\\sqrt{" * 500 + "2" + "}" * 500 + "}",
        "$" * 4000,
        "\\frac" * 1000,
        "\\boxed{" + "9" * 6000 + "}",
        "\\boxed{1/0}",
        "\\boxed{\\infty - \\infty}",
        "\\boxed{10^{-400}}",
        "\\boxed{__import__('os').abort()}",
        "\\boxed{x" + "^x" * 400 + "}",
        "\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 \\end{pmatrix}}",
        "\\boxed{5!!!!!!}",
        "\\boxed{100000!}",
        "\n" * 10000 + "5",
        "1 " * 20000,
        "a=b=c=" * 2000,
        "\\boxed{\\lim_{x \\to 0} \\frac{\\sin x}{x}}",
    ]
    start = time.monotonic()
    grades = grade_answers(junk, [3] * len(junk), seconds=1.0)
    assert len(grades) == len(junk)
    assert not any(grade.correct for grade in grades)
    # Far above what it takes: that nothing waits for ever.
    assert time.monotonic() - start < 400


PR_CAPBSET_DROP = CAP_SYS_RESOURCE = 24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "most"), [(resource.RLIMIT_CPU, 100), (resource.RLIMIT_AS, 3 << 29)]
)
def test_limits_that_somebody_has_set_stay(kind, most):
    libc = ctypes.CDLL(None)

    def limit():
        resource.setrlimit(kind, (most, most))
        libc.prctl(PR_CAPBSET_DROP, CAP_SYS_RESOURCE, 0, 0, 0)  # root may not raise it, either

    lines = "".join(json.dumps(["18", [answer], 500.0]) + "\n" for answer in ("18", "19"))
    done = subprocess.run(
        [sys.executable, "-P", maths.maths_worker.__file__],
        input=lines.encode(), preexec_fn=limit, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.decode().split() == ["ready", "right", "wrong"]


@pytest.mark.slow
def test_a_process_that_cannot_be_limited_says_why(monkeypatch, tmp_path):
    text = Path(maths.maths_worker.__file__).read_text()
    broken = tmp_path / "worker.py"
    broken.write_text(text.replace("_MEMORY = 2 << 30", "_MEMORY = 2 << 90"))
    monkeypatch.setattr(maths.maths_worker, "__file__", str(broken))
    monkeypatch.setattr(maths, "_shared", None)
    with pytest.raises(RuntimeError, match=r"(?s)did not start: .*setrlimit"):
        grade_answers(["1"], [1])


def sample(response, answer):
    return Sample("p", response, answer, {}, "d.jsonl:1")


def test_as_a_reward():
    rewards = Rewards(RewardConfig(("math_verify",), answer_seconds=0.5))
    judged = rewards.judge([sample(r"\boxed{1/2}", 0.5), sample("3", "4"), sample(ENDLESS, 1)])
    assert judged.by_function == {"math_verify": [1.0, 0.0, 0.0]}
    assert rewards.problem_of(" ", {}) == (
        "reward math_verify: expected an answer that is not empty, got ' '"
    )
    assert "expected an answer that is text" in rewards.problem_of(None, {})
    assert rewards.problem_of(["1", 2], {}) is None
    for seconds in (0.0, float("nan")):
        with pytest.raises(ConfigError, match=r"reward\.answer_seconds: expected more than 0"):
            RewardConfig(answer_seconds=seconds)


def test_without_math_verify_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(maths, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'math_verify' needs math-verify \(pip install .*math-"):
        Rewards(RewardConfig(("math_verify",)))
    monkeypatch.setattr(maths, "_shared", None)
    with pytest.raises(ImportError, match="judging mathematical answers needs math-verify"):
        grade_answers(["1"], [1])


def test_a_process_that_cannot_start_says_why(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no antlr')")
    monkeypatch.setattr(maths.maths_worker, "__file__", str(broken))
    monkeypatch.setattr(maths, "_shared", None)
    with pytest.raises(RuntimeError, match=r"did not start: no antlr$"):
        grade_answers(["1"], [1])
