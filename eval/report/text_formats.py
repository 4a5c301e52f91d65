"""A table as text for papers: Markdown and LaTeX (booktabs).

Two tables each: scores, and differences to full attention with their intervals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from attention_predictor.eval.display.text_table import MISSING
from attention_predictor.eval.harness.bootstrap import LEVEL
from attention_predictor.eval.harness.measure import Column
from attention_predictor.eval.report.results_table import SHOWN, ResultsTable, Row

BEST = "bold: best policy at a budget, full attention and the oracle apart"
INTERVAL = f"[{LEVEL:.0%} bootstrap interval over samples]"

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "·": r"\textperiodcentered{}",
    "−": r"$-$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def signed(value: float) -> str:
    """Format with a sign, using U+2212 for minus; zero has no sign."""
    text = format(value, "+.2f")
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def interval_text(between: tuple[float, float] | None, show: Callable[[float], str]) -> str:
    """``[low, high]``; empty where there is none."""
    return f"[{show(between[0])}, {show(between[1])}]" if between else ""


def score_text(value: float) -> str:
    return format(value, SHOWN).replace("-", "−")


def budget_text(row: Row) -> str:
    return "all" if row.budget is None else str(row.budget)


def markdown(table: ResultsTable) -> str:
    """Headline, both tables and notes."""
    parts = [f"## {escape_markdown(table.title)}", _markdown_scores(table)]
    if any(figure.delta is not None for figure in table.figures.values()):
        parts += [_delta_title(table), _markdown_deltas(table)]
    parts.append("\n".join(f"- {escape_markdown(note)}" for note in notes(table)))
    return "\n\n".join(parts) + "\n"


def notes(table: ResultsTable) -> list[str]:
    """Notes below a table."""
    figures = table.figures.values()
    legend = [table.measure.what]
    legend += [BEST] if any(figure.best for figure in figures) else []
    legend += [INTERVAL] if any(figure.interval is not None for figure in figures) else []
    return ["; ".join(legend), *table.notes]


def latex(table: ResultsTable) -> str:
    r"""Both tables, for ``\usepackage{booktabs}``."""
    tables = [_latex_table(table, _scores_latex, table.title)]
    if any(figure.delta is not None for figure in table.figures.values()):
        tables.append(_latex_table(table, _deltas_latex, f"{table.title}: {_delta_title(table)}"))
    return "\n".join(tables)


def escape_markdown(text: str) -> str:
    """Escape characters that Markdown or HTML would interpret."""
    escaped = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _delta_title(table: ResultsTable) -> str:
    full = table.full
    return f"Difference to {full.name if full is not None else MISSING}"


def _markdown_scores(table: ResultsTable) -> str:
    def cell(row: Row, column: Column) -> str:
        figure = table.figures.get((row.name, column.title))
        if figure is None:
            return MISSING
        value = score_text(figure.value)
        return f"{f'**{value}**' if figure.best else value} {interval_text(figure.interval, score_text)}".strip()

    return _markdown_table(table, table.rows, cell)


def _markdown_deltas(table: ResultsTable) -> str:
    def cell(row: Row, column: Column) -> str:
        figure = table.figures.get((row.name, column.title))
        if figure is None or figure.delta is None:
            return MISSING
        return f"{signed(figure.delta)} {interval_text(figure.delta_interval, signed)}".strip()

    return _markdown_table(table, [row for row in table.rows if row is not table.full], cell)


def _markdown_table(table: ResultsTable, rows: Sequence[Row], cell: Callable[[Row, Column], str]) -> str:
    titles = ["policy", "budget", *(escape_markdown(column.title) for column in table.columns)]
    lines = [titles, [":--", *["--:"] * (len(titles) - 1)]]
    for row in rows:
        lines.append([escape_markdown(row.policy), budget_text(row), *(cell(row, one) for one in table.columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores_latex(table: ResultsTable, row: Row, column: Column) -> str:
    figure = table.figures.get((row.name, column.title))
    if figure is None:
        return MISSING
    value = score_text(figure.value)
    return rf"\textbf{{{escape_latex(value)}}}" if figure.best else escape_latex(value)


def _deltas_latex(table: ResultsTable, row: Row, column: Column) -> str:
    figure = table.figures.get((row.name, column.title))
    if row is table.full or figure is None or figure.delta is None:
        return MISSING
    between = escape_latex(interval_text(figure.delta_interval, signed))
    return escape_latex(signed(figure.delta)) + (rf" {{\scriptsize {between}}}" if between else "")


def _latex_table(table: ResultsTable, cell: Callable[[ResultsTable, Row, Column], str], title: str) -> str:
    tasks = sum(not column.average for column in table.columns)
    spec = "lr" + "r" * tasks + ("|" + "r" * (len(table.columns) - tasks) if len(table.columns) > tasks else "")
    heads = [rf"\rotatebox{{90}}{{{escape_latex(column.title)}}}" for column in table.columns]
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{escape_latex(title)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        " & ".join(["policy", "budget", *heads]) + r" \\",
    ]
    budget: object = ""
    for row in table.rows:
        if row.budget != budget:
            lines.append(r"\midrule")
            budget = row.budget
        cells = [escape_latex(row.policy), budget_text(row), *(cell(table, row, one) for one in table.columns)]
        lines.append(" & ".join(cells).replace(MISSING, "--") + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    lines += [rf"\par\footnotesize {escape_latex(note)}" for note in notes(table)]
    return "\n".join([*lines, r"\end{table}", ""])
