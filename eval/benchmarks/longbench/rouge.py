"""ROUGE-L as LongBench's scorer computes it: the F value that the package ``rouge`` 1.0.1 gives for a summary.

It differs from the ROUGE-L of textbooks in three ways, all kept here. Sentences are what stands between full stops.
What counts is the number of *different* words: those of all longest common subsequences of any reference sentence with
any predicted one, against those of prediction and reference. And where a common subsequence is longer to trace than
Python's recursion goes, the official scorer takes the error for a score of 0.
"""

from __future__ import annotations

# Steps that the package can trace when the official script calls it, under CPython 3.8 to 3.10; later ones go 2 or 3
# further.
DEEPEST = 988
EPSILON = 1e-8


class TooDeep(Exception):
    """The official scorer would have run out of recursion here."""


def rouge_l(prediction: str, reference: str, *, frames: int = 0) -> float:
    """F value from 0 to 1 of two texts whose words are separated by blanks.

    Args:
        frames: Calls that the official script has made beyond those of an English task.
    """
    predicted, expected = _sentences(prediction), _sentences(reference)
    if not predicted or not expected:
        return 0.0
    common: set[str] = set()
    try:
        for sentence in expected:
            for candidate in predicted:
                common |= _common_words(sentence, candidate, DEEPEST - frames)
    except TooDeep:
        return 0.0
    precision = len(common) / len({word for sentence in predicted for word in sentence})
    recall = len(common) / len({word for sentence in expected for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + EPSILON))


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence; a blank sentence has one empty word."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_words(expected: list[str], predicted: list[str], deepest: int) -> set[str]:
    """Words of one longest common subsequence; which one of several, the way back through the table decides."""
    above = [0] * (len(predicted) + 1)
    table = [above]
    for word in expected:
        row = [0]
        for column, other in enumerate(predicted):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        table.append(row)
        above = row
    i, j, steps = len(expected), len(predicted), 1
    found = set()
    while i and j:
        if expected[i - 1] == predicted[j - 1]:
            found.add(expected[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
        steps += 1
    if steps > deepest:
        raise TooDeep
    return found
