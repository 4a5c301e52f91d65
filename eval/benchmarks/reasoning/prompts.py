r"""Prompts for problems: chat models get the problem, others worked examples before it.

The wording is ours. What published tables use differs from paper to paper, so that accuracies compare within a table.
"""

from __future__ import annotations

import re

END = "\n\n"  # between a problem and the next one
ASK, SOLVE = "Question: ", "Answer:"

# Where a file's problems already end in such an instruction, it is replaced by ours.
_INSTRUCTION = re.compile(r"\n[^\n]*\\boxed\{\}[^\n]*\Z")
INSTRUCTION = r"Solve this step by step. Put the final answer, and nothing else, into \boxed{} at the end."

WORD_PROBLEMS = (
    (
        "A gardener plants 7 rows of 12 tulips. Frost kills 19 of them. How many tulips are left?",
        "There are 7 * 12 = 84 tulips. After the frost, 84 - 19 = 65 are left. The answer is 65.",
    ),
    (
        "Nora buys 3 notebooks at $4 each and a pen for $2.50. She pays with a $20 note. How many dollars does she get "
        "back?",
        "The notebooks cost 3 * 4 = 12 dollars. With the pen that is 12 + 2.5 = 14.5 dollars. She gets back 20 - 14.5 "
        "= 5.5 dollars. The answer is 5.5.",
    ),
    (
        "A train goes 180 km in 2 hours and then 150 km in 3 hours. What is its mean speed over the whole way, in km "
        "per hour?",
        "The whole way is 180 + 150 = 330 km. It takes 2 + 3 = 5 hours. The mean speed is 330 / 5 = 66 km per hour. "
        "The answer is 66.",
    ),
    (
        "Of 240 guests 25% leave before dinner, and half of the others leave after it. How many stay?",
        "Before dinner 240 * 25 / 100 = 60 guests leave, so 240 - 60 = 180 are there. Half of them leave, so 180 / 2 = "
        "90 stay. The answer is 90.",
    ),
)

MATHEMATICS = (
    (
        "What is the sum of all solutions of $x^2 - 7x + 10 = 0$?",
        r"The polynomial is $(x - 2)(x - 5)$, so that the solutions are $2$ and $5$. Their sum is $\boxed{7}$.",
    ),
    (
        "A fair die is thrown twice. What is the probability that the sum is $9$?",
        "Of $36$ equally likely pairs those with sum $9$ are $(3,6)$, $(4,5)$, $(5,4)$ and $(6,3)$. The probability is "
        r"$\frac{4}{36} = \boxed{\frac{1}{9}}$.",
    ),
    (
        "A right triangle has legs of length $2$ and $6$. How long is its hypotenuse?",
        r"By the theorem of Pythagoras its square is $2^2 + 6^2 = 40$. So it is $\sqrt{40} = \boxed{2\sqrt{10}}$ long.",
    ),
    (
        "What is the remainder when $3^{20}$ is divided by $10$?",
        "The last digits of powers of $3$ are $3, 9, 7, 1$, again and again. As $20$ is a multiple of $4$, the last "
        r"digit of $3^{20}$ is $1$, and the remainder is $\boxed{1}$.",
    ),
)


def as_task(problem: str) -> str:
    """The problem with an instruction, for a user's turn of a chat."""
    return _bare(problem) + END + INSTRUCTION


def behind_examples(problem: str, examples: tuple[tuple[str, str], ...]) -> str:
    """The problem after solved examples."""
    solved = [f"{ASK}{asked}\n{SOLVE} {answer}" for asked, answer in examples]
    return END.join([*solved, f"{ASK}{_bare(problem)}\n{SOLVE}"])


def _bare(problem: str) -> str:
    return _INSTRUCTION.sub("", problem.strip()).strip()
