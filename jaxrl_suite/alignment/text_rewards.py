r"""The paper's three rewards on text, on the host: accuracy, conciseness and clarity as its code defines them.

``accuracy`` and ``clarity`` follow the published code to the letter, odd cases included (see the golden corpus in the
tests); ``corrected_clarity`` is the same idea without the accidents: a one-letter word before a full stop is no list
item. All have the calling convention ``f(prompts, completions, **columns) -> list``.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

BOXED = "\\boxed"
_ENUMERATOR = re.compile(r"(?:^|\s|\()(?:step\s*)?(?:\d+|[a-z]|[ivxlcdm]+)[).:\-]", re.IGNORECASE | re.MULTILINE)
_BULLET = re.compile(r"(?:^|\s)[-*•]\s", re.MULTILINE)
_ORDINAL = re.compile(
    r"\b(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|next|then)\b", re.IGNORECASE
)
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:,\d{3})*(?:\.\d+)?")
_FILLED_BOX = re.compile(r"\\boxed\{\s*[^}\s]")
_LINE_ITEM = re.compile(
    r"^\s*(?:(?:step\s+)?\d+[).:]|[-*•]|\(?[a-h]\)|\*\*(?:step\s+)?\d+[).:]?\*\*)\s+\S", re.I | re.M
)


def last_number(text: str) -> str | None:
    """The last number of a text, without thousands separators, or None.

    >>> last_number("4 + 3 = 7, so 1,007.50 in all.")
    '1007.50'
    """
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last box of a text, or None.

    If ``\boxed`` followed by a blank occurs anywhere, the text after its last occurrence up to the next ``$``; else the
    last ``\boxed`` up to the brace that closes it. A box that is never closed, and an ``\fbox``, give None.

    >>> last_boxed(r"so \boxed{1 + \frac{1}{2}} it is")
    '1 + \\frac{1}{2}'
    """
    if BOXED + " " in text:
        return text.split(BOXED + " ")[-1].split("$")[0]
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth = 0
    for position in range(start, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                inside = text[start : position + 1]
                return inside[len(BOXED) + 1 : -1] if inside.startswith(BOXED + "{") else None
    return None


def _brace_roots(text: str) -> str:
    """Puts braces around a bare argument of a square root: its first character."""
    parts = text.split("\\sqrt")
    return parts[0] + "".join(
        "\\sqrt" + (part if not part or part[0] == "{" else "{" + part[0] + "}" + part[1:]) for part in parts[1:]
    )


def _brace_fractions(text: str) -> str:
    """Puts braces around bare arguments of fractions; leaves the text alone where there is too little to take."""
    parts = text.split("\\frac")
    result = parts[0]
    for part in parts[1:]:
        result += "\\frac"
        if part.startswith("{"):
            result += part
            continue
        if len(part) < 2:
            return text
        first, second, rest = part[0], part[1], part[2:]
        result += "{" + first + "}" + (second if second == "{" else "{" + second + "}") + rest
    return result


def _slash_fraction(text: str) -> str:
    """An integer over an integer becomes a fraction."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        top, bottom = int(parts[0]), int(parts[1])
    except ValueError:
        return text
    return "\\frac{" + str(top) + "}{" + str(bottom) + "}" if text == f"{top}/{bottom}" else text


def normalise_answer(text: str) -> str:
    r"""Brings a LaTeX answer into the form in which answers are compared as strings.

    >>> normalise_answer("0.5"), normalise_answer("x = 50\\%")
    ('\\frac{1}{2}', '50')
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if "\\text{ " in text:
        pieces = text.split("\\text{ ")
        text = pieces[0] if len(pieces) == 2 else text
    text = text.replace("\\%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _brace_roots(text).replace(" ", "")
    text = _brace_fractions(text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _slash_fraction(text)


def is_correct(completion: str, answer: str) -> bool:
    """Whether the last box of a completion equals the reference after normalisation."""
    found = last_boxed(completion)
    return found is not None and normalise_answer(found) == normalise_answer(answer)


def accuracy(
    prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[str], wrong: float = 0.0, **columns: Any
) -> list[float | None]:
    r"""1 if the last boxed answer equals the reference, else 0 (D10: the code's comment says -1, pass ``wrong``).

    Args:
        prompts: not read.
        completions: texts.
        answer: reference answers, one a completion.
        wrong: what a wrong answer scores.
        **columns: not read.

    Returns:
        One number a completion; None where there is no reference.

    References:
        Lu et al. (2025), arXiv 2509.11452, and its repository; normalisation after Hendrycks et al. (2021), the MATH
        data set.

    >>> accuracy([""], [r"It is \boxed{1/2}."], answer=["0.5"])
    [1.0]
    """
    del prompts, columns
    return [
        None if reference is None else 1.0 if is_correct(text, reference) else wrong
        for text, reference in zip(completions, answer, strict=True)
    ]


def is_clear(completion: str) -> bool:
    """The published clarity: a filled box, and at least two enumerators or at least two ordinal words."""
    if not _FILLED_BOX.search(completion):
        return False
    enumerators = len(_ENUMERATOR.findall(completion)) + len(_BULLET.findall(completion))
    return enumerators >= 2 or len(_ORDINAL.findall(completion)) >= 2


def clarity(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
    r"""1 if the completion has a filled box and counts as step by step by the published patterns, else 0.

    Ordinary prose satisfies them easily: "So we get x. And y." has two "enumerators". See :func:`corrected_clarity`.

    >>> clarity([""], ["Step 1: add. Step 2: done. \\boxed{3}"])
    [1.0]
    """
    del prompts, columns
    return [float(is_clear(text)) for text in completions]


def corrected_clarity(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
    r"""1 if the completion has a filled box and at least two steps: list items at the start of a line, or ordinals.

    Differs: items count only at the start of a line and followed by text; bold numbers count; list items and
    *different* ordinal words are pooled.

    >>> corrected_clarity([""], ["So we get x. And y. \\boxed{3}"])
    [0.0]
    >>> corrected_clarity([""], ["**1.** Add.\n**2.** Done. \\boxed{3}"])
    [1.0]
    """
    del prompts, columns
    scores: list[float | None] = []
    for text in completions:
        words = {word.lower() for word in _ORDINAL.findall(text)}
        steps = len(_LINE_ITEM.findall(text)) + len(words)
        scores.append(float(bool(_FILLED_BOX.search(text)) and steps >= 2))
    return scores


def conciseness(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    mean_length: float,
    count_tokens: Callable[[str], int],
    **columns: Any,
) -> list[float | None]:
    """1 if a completion is shorter than the running mean length of all completions so far, else 0.

    Args:
        prompts: not read.
        completions: texts without special tokens.
        mean_length: running mean in tokens, this batch included (:class:`RunningMean`).
        count_tokens: number of tokens of a text; the published code tokenises the decoded text again.
        **columns: not read.

    >>> conciseness(["", ""], ["a b", "a b c d"], mean_length=3.0, count_tokens=lambda text: len(text.split()))
    [1.0, 0.0]
    """
    del prompts, columns
    return [float(count_tokens(text) < mean_length) for text in completions]
