r"""What a short piece of LaTeX stands for: one spelling of many, and the number it has.

``normalise`` gives one spelling (delimiters, spaces, units, ``\dfrac43`` for ``\frac{4}{3}``);
``value`` computes constants. Neither is a computer algebra system: ``(a+1)(b+2)`` and ``(b+2)(a+1)`` stay different.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

Number = Fraction | float

MOST_CHARACTERS = 400  # longest constant; longer texts are not answers
MOST_BITS = 4096  # largest size of a power
# What stands for \\, \{ and \}, so that no part of them is taken for something else.
ROW_BREAK, SET_OPEN, SET_CLOSE = "\x00", "\x01", "\x02"

_TEXT = re.compile(
    r"\s*\\(?:text|mbox|mathrm|textrm|textbf|textit|mathit|mathbf|operatorname)\s*\{([^{}]*)\}(\^\{?[23]\}?)?"
)
_PLAIN = {
    **dict.fromkeys(("$", "`", r"\(", r"\)", r"\[", r"\]", r"\!", r"\,", r"\;", r"\:", "\\ ", "~", "°"), ""),
    "−": "-",
    "–": "-",
    "×": "*",
    "·": "*",
    "π": r"\pi ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "√": r"\sqrt ",
    "{,}": ",",
    r"\%": "%",
    r"\{": SET_OPEN,
    r"\}": SET_CLOSE,
}
_MACROS = {
    **dict.fromkeys(("left", "right", "big", "Big", "bigg", "Bigg", "displaystyle", "quad", "qquad", "degree"), ""),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"),
    "cdot": "*",
    "times": "*",
    "div": "/",
    "leq": r"\le",
    "geq": r"\ge",
    "lbrace": SET_OPEN,
    "rbrace": SET_CLOSE,
}
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_NAMED = re.compile(r"^[A-Za-z](?:_\w|\([A-Za-z]\))?\s*(?:=|\\in(?![A-Za-z]))\s*")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?%?")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "mod", "and", "or", "pi"}
_UNITS = {"cm", "mm", "km", "kg", "mg", "ml", "lb", "oz", "ft", "in", "mi", "am", "pm", "mph", "min", "hr", "hrs"}


def normalise(text: str) -> str:
    """One spelling of a text: without spaces, units and formula delimiters."""
    if len(text) > MOST_CHARACTERS:
        return text
    text = text.strip().replace(r"\$", "").replace("\\\\", ROW_BREAK)
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w(-])", "^", text).replace("**", "")  # a power, or bold
    for mark, plain in _PLAIN.items():
        text = text.replace(mark, plain)
    text = _DEGREES.sub("", text)
    text = re.sub(r"\\([A-Za-z]+)", lambda found: _MACROS.get(found[1], found[0]), text)
    text = _without_text(text.strip()).strip("= ").rstrip(".,;: ")
    if text.count("=") <= 1:
        text = _NAMED.sub("", text)
    text = re.sub(r"(?<![\d.])(\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"\s+", "", _without_unit(_with_braces(text)))
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    choice = re.fullmatch(r"\(([A-Za-z])\)", text)
    return choice[1] if choice else text.removeprefix("+")


def value(text: str) -> Number | None:
    """The number that a normalised constant stands for, exactly where it is rational; ``None`` if it is none."""
    if len(text) > MOST_CHARACTERS:
        return None
    try:
        return _Constant(text).whole()
    except (_NotConstant, ZeroDivisionError, OverflowError, RecursionError, ValueError):
        return None


def _without_text(text: str) -> str:
    r"""Replace ``\text{…}`` by its content; remove it at the end, where it is a unit."""

    def plain(found: re.Match[str]) -> str:
        is_unit = found.start() > 0 and found.end() == len(text)
        return "" if is_unit else f" {found[1]} {found[2] or ''}"

    return _TEXT.sub(plain, text)


def _without_unit(text: str) -> str:
    """``18 dollars per day`` as ``18``, and ``5cm`` as ``5``."""
    head, _, tail = text.partition(" ")
    while tail and not tail[0].isalpha():
        more, _, tail = tail.partition(" ")
        head += " " + more
    word = re.match(r"[A-Za-z]*", tail)
    named = word[0] if word else ""
    is_unit = (len(named) > 2 or named in _UNITS) and named not in _FUNCTIONS and "=" not in tail
    if is_unit and value(re.sub(r"[\s,]", "", head).rstrip("%")) is not None:
        return head
    attached = re.fullmatch(r"(.*\d)([A-Za-z]{2,3})", text)
    return attached[1] if attached and attached[2] in _UNITS else text


def _with_braces(text: str) -> str:
    r"""Put all arguments of ``\frac`` and ``\sqrt`` in braces; LaTeX allows one token without."""
    done, rest = "", text
    while found := re.search(r"\\(frac|sqrt)(?![A-Za-z])\s*", rest):
        done += rest[: found.start()] + "\\" + found[1]
        rest = rest[found.end() :]
        if found[1] == "sqrt" and rest.startswith("["):
            root, bracket, rest = rest.partition("]")
            done += root + bracket
        for left in range(2 if found[1] == "frac" else 1, 0, -1):
            rest = rest.lstrip()
            if rest.startswith("{"):
                if left > 1:
                    argument = _group(rest)
                    done, rest = done + "{" + _with_braces(argument) + "}", rest[len(argument) + 2 :]
                continue  # the next iteration handles the content of the last braces
            token = re.match(r"\\[A-Za-z]+|.", rest)
            if token is not None:
                done, rest = done + "{" + token[0] + "}", rest[token.end() :]
    return done + rest


def _group(text: str) -> str:
    """Content of the braces that a text begins with; everything if they are not closed."""
    depth = 0
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[1:place]
    return text[1:]


class _NotConstant(Exception):
    """The text is not arithmetic on numbers."""


class _Constant:
    """A recursive descent over sums, products, powers, fractions and roots."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def whole(self) -> Number:
        result = self.sum()
        if self.at < len(self.text):
            raise _NotConstant
        return result

    def take(self, *tokens: str) -> str | None:
        for token in tokens:
            if self.text.startswith(token, self.at):
                self.at += len(token)
                return token
        return None

    def sum(self) -> Number:
        total = self.product()
        while sign := self.take("+", "-"):
            part = self.product()
            total = total + part if sign == "+" else total - part
        return total

    def product(self) -> Number:
        total = self.signed()
        while self.at < len(self.text):
            if self.take("*"):
                total = total * self.signed()
            elif self.take("/"):
                total = total / self.signed()
            elif self.text[self.at] in "\\(":  # side by side: multiplied
                total = total * self.power()
            else:
                break
        return total

    def signed(self) -> Number:
        if sign := self.take("-", "+"):
            return -self.signed() if sign == "-" else self.signed()
        return self.power()

    def power(self) -> Number:
        base = self.atom()
        if not self.take("^"):
            return base
        exponent = self.braced() if self.text.startswith("{", self.at) else self.digit_or_sign()
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(exponent) > MOST_BITS:
                raise _NotConstant
            return base ** int(exponent)
        if base < 0:
            raise _NotConstant
        return float(base) ** float(exponent)

    def digit_or_sign(self) -> Number:
        r"""An exponent without braces: one character in LaTeX, possibly more in plain text."""
        found = re.compile(r"-?\d+").match(self.text, self.at)
        if found is None:
            return self.atom()
        self.at = found.end()
        return Fraction(found[0])

    def atom(self) -> Number:
        if self.take("("):
            inner = self.sum()
            if not self.take(")"):
                raise _NotConstant
            return inner
        if self.text.startswith("{", self.at):
            return self.braced()
        if self.take(r"\frac"):
            return self.braced() / self.braced()
        if self.take(r"\sqrt"):
            return self.root()
        if self.take(r"\pi"):
            return math.pi
        return self.number()

    def braced(self) -> Number:
        if not self.take("{"):
            raise _NotConstant
        inner = self.sum()
        if not self.take("}"):
            raise _NotConstant
        return inner

    def root(self) -> Number:
        degree: Number = Fraction(2)
        if self.take("["):
            degree = self.sum()
            if not self.take("]"):
                raise _NotConstant
        radicand = self.braced()
        if radicand < 0 or degree <= 0:
            raise _NotConstant
        if degree == 2 and isinstance(radicand, Fraction):
            parts = math.isqrt(radicand.numerator), math.isqrt(radicand.denominator)
            if Fraction(parts[0] ** 2, parts[1] ** 2) == radicand:
                return Fraction(*parts)
        return float(radicand) ** (1 / float(degree))

    def number(self) -> Number:
        found = re.compile(r"\d+\.?\d*|\.\d+").match(self.text, self.at)
        if found is None:
            raise _NotConstant
        self.at = found.end()
        number = Fraction(found[0].rstrip("."))
        mixed = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}").match(self.text, self.at)
        if number.denominator == 1 and mixed and int(mixed[1]) < int(mixed[2]):  # 1 4/5 is a sum
            self.at = mixed.end()
            number += Fraction(int(mixed[1]), int(mixed[2]))
        return number
