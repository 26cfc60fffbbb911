r"""The final answer in a text: what is inside the last `\boxed{}`, or what follows the last "Answer:".

Every function takes linear time, whatever the text: these run outside the sandbox, on a model's output.
"""

import re

# A box opens, an escaped character (so that \{ and \} do not count), or a brace.
_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"[\s$,;.&]*(?:and|or)?[\s$,;.&]*")
_BETWEEN_BOXES_MAX = 20  # characters
# At the start of a line, perhaps as Markdown: "**Final Answer:** 12".
_ANSWER_LINE = re.compile(r"^[ \t*_#>-]*(?:the[ ]+)?(?:final[ ]+)?answer[ *_]*[:：][ \t*_]*\n?([^\n]+)", re.I | re.M)
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))


def final_answer(text: str) -> str | None:
    r"""The answer a text ends with: of the last run of boxes, else of the last line "Answer: ...", else None.

    Boxes that only commas or "and" separate are one answer: `\boxed{1} and \boxed{2}` gives "1, 2".
    """
    if (boxed := last_boxed(text)) is not None:
        return boxed
    lines = _ANSWER_LINE.findall(text)
    return (tidy(lines[-1]) or None) if lines else None


def last_boxed(text: str) -> str | None:
    r"""Contents of the last run of complete `\boxed{...}` (or `\fbox{...}`), braces balanced; None without one."""
    boxes = _boxes(text)
    if not boxes:
        return None
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[2] : run[-1][0]]
        if len(between) > _BETWEEN_BOXES_MAX or not _BETWEEN_BOXES.fullmatch(between):
            break
        run.append(box)
    contents = dict.fromkeys(tidy(text[start : end - 1]) for _, start, end in reversed(run))
    return ", ".join(filter(None, contents)) or None


def tidy(answer: str) -> str:
    """Without the white space, full stop and pair of math or Markdown delimiters around an answer."""
    before = None
    while before != answer:
        before = answer
        answer = answer.strip().removesuffix(".")
        for opening, closing in _DELIMITERS:
            inner = answer[len(opening) : -len(closing)]
            if answer.startswith(opening) and answer.endswith(closing) and inner and opening not in inner:
                answer = inner
                break
    return answer


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """Complete boxes that no other complete box contains: start, start of the contents, end; in order."""
    found: list[tuple[int, int, int]] = []
    open_braces: list[tuple[int, int] | None] = []  # a box's start and contents, or None for a plain brace
    for token in _TOKENS.finditer(text):
        word = token.group()
        if word == "{":
            open_braces.append(None)
        elif word == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                while found and found[-1][0] > box[0]:  # inside this one
                    found.pop()
                found.append((*box, token.end()))
        elif word[-1] == "{" and len(word) > 2:  # not the escaped \{
            open_braces.append(token.span())
    return found
