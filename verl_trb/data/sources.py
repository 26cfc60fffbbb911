"""The named data sets: where they are on the Hugging Face hub, and what must be known to read them.

Columns are found by shapes.py; a source names them only where the set has several that would fit.
"""

import difflib
from dataclasses import dataclass

from verl_trb.errors import UserError

REASONING_GYM = "reasoning_gym/"


@dataclass(frozen=True)
class Source:
    """One data set.

    rows: how many the set is known to have, to notice a file that is not it. keep: a column and the value it must
    have. context: a column whose text, where there is any, comes before the question. model_answers: the answers
    are those of a model's responses, so that copies of a question may disagree.
    """

    name: str
    hub: str
    split: str
    evaluation: bool
    rows: int | None = None
    config: str | None = None
    keep: tuple[str, str] | None = None
    context: str | None = None
    limit: int | None = None
    model_answers: bool = False
    subset: str | None = None  # in words, for the list of sets


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "openthoughts3",
            "open-thoughts/OpenThoughts3-1.2M",
            "train",
            evaluation=False,
            rows=1_200_000,
            keep=("domain", "math"),
            limit=25_600,
            model_answers=True,
            subset="the first 25,600 math questions",
        ),
        Source("dapo_math_17k", "BytedTsinghua-SIA/DAPO-Math-17k", "train", evaluation=False),
        Source("deepmath_103k", "zwhe99/DeepMath-103K", "train", evaluation=False),
        Source("gsm8k", "openai/gsm8k", "train", evaluation=False, rows=7473, config="main"),
        Source("math", "DigitalLearningGmbH/MATH-lighteval", "train", evaluation=False, rows=7500),
        Source("math500", "HuggingFaceH4/MATH-500", "test", evaluation=True, rows=500),
        Source("aime24", "math-ai/aime24", "test", evaluation=True, rows=30),
        Source("aime25", "math-ai/aime25", "test", evaluation=True, rows=30),
        Source("amc23", "math-ai/amc23", "test", evaluation=True, rows=40),
        Source(
            "olympiadbench",
            "Hothan/OlympiadBench",
            "train",
            evaluation=True,
            rows=674,
            config="OE_TO_maths_en_COMP",
            context="context",
            subset="open-ended English text-only competition math",
        ),
        Source("minerva", "math-ai/minervamath", "test", evaluation=True, rows=272),
        Source("gsm8k_test", "openai/gsm8k", "test", evaluation=True, rows=1319, config="main"),
    )
}


def find_source(name: str) -> Source:
    """The set of that name. Raises UserError with near matches for another."""
    if name in SOURCES:
        return SOURCES[name]
    simple = {_simple(known): known for known in SOURCES} | {
        _simple(source.hub.split("/")[1]): source.name for source in reversed(SOURCES.values())
    }
    near = difflib.get_close_matches(_simple(name.split("/")[-1]), simple, n=3, cutoff=0.5)
    names = list(dict.fromkeys(simple[match] for match in near))
    advice = f"did you mean {' or '.join(names)}?" if names else f"there are {', '.join(SOURCES)}."
    raise UserError(f"There is no data set {name!r}; {advice}")


def _simple(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
