"""Nothing that a model says ends the judging, or makes it judge others wrong."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("math_verify")

from spec_rollout.rewards.maths import Grade, grade_answers

_LATEX = r"""
\boxed{ \frac{ \sqrt[ } ] ) ( ^ _ \\ $ $$ #### , . = < \le \in \cup \pm ! % 0 7 -1 1e9 10^{99}
\int_0^1 \sum_{n=1}^{\infty} \lim_{x\to0} \begin{pmatrix} & \end{pmatrix} \text{ \mathrm{
x y f(x) \sin \log \infty \pi i \cdot \times \left( \right) \{ \} | [ answer: is {} \binom
"""
PIECES = [*_LATEX.split(), "\n", "\x00", "\ud800", "é", "答案", " ", "the final answer is "]


@pytest.mark.slow
def test_random_texts():
    generator = random.Random(0)
    texts = ["".join(generator.choices(PIECES, k=generator.randint(1, 60))) for _ in range(400)]
    responses, answers, wanted = [], [], []
    for number, text in enumerate(texts):
        responses += [text, rf"\boxed{{{number}}}", "3"]
        # As a response, as the answer, and as one of the answers.
        answers += [number % 7, number, [text, "3"]]
        wanted.append(Grade(True))
    grades = grade_answers(responses, answers, seconds=0.5)
    assert len(grades) == len(responses)
    assert grades[1::3] == wanted
    # The right one of two answers is found unless the other one ends the process.
    assert all(grade.correct or grade.out_of_time for grade in grades[2::3])
