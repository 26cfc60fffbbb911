"""Train/evaluation overlap: what counts as the same question, pinned to a count of n-grams done another way."""

import random

import pytest

from verl_trb.data.overlap import NEAR, NGRAM, EvaluationSets, ngrams, normalized, tokens

QUESTION = (
    "Let $ABC$ be a triangle with $AB=13$, $BC=14$ and $CA=15$. The tangents to its circumcircle at $B$ and $C$ meet "
    "at $D$. Find the length of $AD$, rounded to two places."
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is $2 + 2$?", "what is \\(2+2\\)"),
        ("Find $\\dfrac{1}{2}$.", "Find \\[ \\frac{1}{2} \\]"),
        ("$x^{2}$", "$x^2$"),
        ("$1,000$ men", "1000 men"),
        ("$1{,}000$ men", "1000 men"),
        ("\\left( a, b \\right)", "(a,b)"),
        ("**Find** \\textbf{x}", "Find x"),
        ("\uff11\uff12 cats", "12 cats"),
        ("求 $x$ 的值", "求x的值"),
        ("1, 2, \\ldots, 9", "1, 2, ..., 9"),
    ],
)
def test_the_same_question(one: str, other: str):
    assert normalized(one) == normalized(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2+2?", "What is 2-2?"),
        ("$(2^3)^4$", "$2^{3^4}$"),
        ("$2(3+4)$", "$2 \\cdot 3+4$"),
        ("0.5", "0 5"),
        ("12", "1 2"),
        ("1,20", "120"),
        ("$5!$", "$5$"),
        ("3*4", "3 4"),
        ("a ratio of 3:4", "a ratio of 3 4"),
        ("$x \\le 2$", "$x \\ge 2$"),
        ("$|x|$", "$x$"),
        ("\\leftarrow", "arrow"),
    ],
)
def test_not_the_same_question(one: str, other: str):
    assert normalized(one) != normalized(other)


@pytest.fixture
def sets() -> EvaluationSets:
    sets = EvaluationSets()
    sets.add("eval.parquet", "e0", QUESTION, "12.5")
    sets.add("eval.parquet", "e1", "What is 2+2?", "4")
    return sets


def test_exact(sets: EvaluationSets):
    match = sets.find("t", QUESTION.replace("$", "").upper(), "12.5")
    assert match is not None
    assert (match.kind, match.evaluation_id, match.share, match.same_answer) == ("exact", "e0", 1.0, True)
    assert sets.find("t", "what is $2 + 2$", "5") is not None
    assert sets.find("t", "What is 2+3?", "5") is None


def test_near(sets: EvaluationSets):
    longer = sets.find("t", f"Here is a problem. {QUESTION} Give your answer as a decimal.", "12.5")
    assert longer is not None and (longer.kind, longer.share) == ("near", 1.0)
    # One number in 40 tokens: the n-grams around it differ.
    other_number = sets.find("t", QUESTION.replace("14", "41"), "3")
    assert other_number is not None and other_number.kind == "near" and not other_number.same_answer
    assert other_number.share == pytest.approx(1 - NGRAM / len(ngrams(tokens(QUESTION))), abs=1e-3)
    half = " ".join(QUESTION.split()[:14]) + " Another end follows it, about nothing that was said before in the text."
    assert sets.find("t", half, "1") is None
    assert sets.find("t", "A question about something else entirely, which shares no eight words.", "1") is None


def test_share_against_a_count_by_hand():
    """Seeded random texts over a small alphabet; the naive share counts every run of NGRAM tokens in both texts."""
    generator = random.Random(3)
    found = 0
    for _ in range(300):
        evaluation = [generator.choice("abc") * generator.choice([1, 2]) for _ in range(generator.randint(9, 30))]
        training = evaluation[:]
        for _ in range(generator.randint(0, 3)):
            training[generator.randrange(len(training))] = "z"
        runs = [evaluation[i : i + NGRAM] for i in range(len(evaluation) - NGRAM + 1)]
        distinct = [run for i, run in enumerate(runs) if run not in runs[:i]]
        inside = [run for run in distinct if any(training[i : i + NGRAM] == run for i in range(len(training)))]
        share = len(inside) / len(distinct)
        sets = EvaluationSets()
        sets.add("e", "0", " ".join(evaluation), "1")
        match = sets.find("t", " ".join(training), "1")
        if training == evaluation:
            assert match is not None and match.kind == "exact"
        elif share >= NEAR:
            assert match is not None and match.kind == "near" and match.share == round(share, 3)
            found += 1
        else:
            assert match is None
    assert found > 30


def test_the_closest_of_several_is_named(sets: EvaluationSets):
    sets.add("other.parquet", "o0", QUESTION.replace("two places", "three places"), "12.513")
    match = sets.find("t", "Problem: " + QUESTION.replace("two places", "three places"), "12.513")
    assert match is not None and match.evaluation_id == "o0"
