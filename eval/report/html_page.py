"""The HTML page of a report: tables, charts, heat maps and settings of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from attention_predictor.errors import DataError
from attention_predictor.eval.display.heatmap import HeatMaps
from attention_predictor.eval.display.html_document import document
from attention_predictor.eval.display.line_charts import Bounds, Lines, Point, curve_chart, legend_mark, line_chart
from attention_predictor.eval.display.svg_heatmap import colour_bar, heat_map
from attention_predictor.eval.display.text_table import MISSING
from attention_predictor.eval.harness.measure import Column, Measure
from attention_predictor.eval.harness.run_folder import RunFolder
from attention_predictor.eval.harness.step_series import mean_series
from attention_predictor.eval.report.block_viewer import SCRIPT, script_source, viewer
from attention_predictor.eval.report.results_table import ResultsTable, Row, describe
from attention_predictor.eval.report.text_formats import budget_text, interval_text, notes, score_text, signed

TITLE = "Selection policies under a budget"
MANY = 4  # charts of tasks, above which they are folded away
WIDE = 8  # columns of a table, above which one has to scroll


@dataclass(frozen=True)
class Traffic:
    """A traffic figure: its name in rows and series, its title, scale and bounds."""

    name: str
    title: str
    scale: float
    bounds: Bounds


TRAFFIC = (
    Traffic("hit_rate", "Hit rate, % of blocks read that no late fetch had to bring", 100.0, (0.0, 100.0)),
    Traffic("fetched_bytes", "Fetched from host memory, KiB a decoding step", 1 / 1024, (0.0, math.inf)),
)

# The page loads nothing and runs only the viewer's script, whatever text the results contain.
_POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src {script_source()}"


def page(tables: Sequence[ResultsTable]) -> str:
    """A whole HTML document."""
    names = ", ".join(dict.fromkeys(table.measure.title for table in tables))
    sections = "\n".join(map(_section, tables))
    script = f"\n<script>{SCRIPT}</script>" if 'class="viewer"' in sections else ""
    body = f'<h1>{TITLE}</h1>\n<p class="quiet">{escape(names)}</p>\n{sections}{script}'
    return document(f"{TITLE}: {names}", body, policy=_POLICY)


def _section(table: ResultsTable) -> str:
    parts = [f"<h2>{escape(table.title)}</h2>", _table(table), _notes(table), _charts(table)]
    for folder in table.folders:
        parts.append(_maps(folder, table.measure))
        text = f"<summary>Settings of {escape(str(folder.path))}</summary>"
        parts.append(f'<details>{text}<div class="scroll"><pre>{escape(describe(folder))}</pre></div></details>')
    return "\n".join(["<section>", *filter(None, parts), "</section>"])


def _table(table: ResultsTable) -> str:
    columns = list(table.columns)
    if len(columns) > WIDE:  # averages first, that of most tasks before all, where they would be far to the right
        most = max(len(one.tasks) for one in columns)
        columns.sort(key=lambda one: (not one.average, len(one.tasks) < most))
    heads = "".join(f'<th scope="col"{_shade(one)}>{escape(one.title)}</th>' for one in columns)
    lines = [f'<thead><tr><th class="policy" scope="col">policy</th><th scope="col">budget</th>{heads}</tr></thead>']
    budget: object = ""
    for row in table.rows:
        first, budget = row.budget != budget, row.budget
        cells = "".join(f"<td{_shade(one)}>{_cell(table, row, one)}</td>" for one in columns)
        name = f'<th class="policy" scope="row">{escape(row.policy)}</th><td>{budget_text(row)}</td>'
        lines.append(f"""<tr{" class='first'" if first else ""}>{name}{cells}</tr>""")
    return f'<div class="scroll" tabindex="0"><table>{"".join(lines)}</table></div>'


def _shade(column: Column) -> str:
    return ' class="average"' if column.average else ""


def _cell(table: ResultsTable, row: Row, column: Column) -> str:
    figure = table.figures.get((row.name, column.title))
    if figure is None:
        return MISSING
    value = score_text(figure.value)
    shown = f"<b>{value}</b>" if figure.best else value
    if figure.interval is not None:
        shown += f"<small>{interval_text(figure.interval, score_text)}</small>"
    if figure.delta is not None:
        shown += f"<small>Δ {signed(figure.delta)} {interval_text(figure.delta_interval, signed)}</small>"
    return shown


def _notes(table: ResultsTable) -> str:
    said = [*notes(table)]
    if any(figure.delta is not None for figure in table.figures.values()) and table.full is not None:
        said.append(f"Δ: difference to {table.full.name}, with its interval")
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in said)}</ul>'


def _charts(table: ResultsTable) -> str:
    policies = list(dict.fromkeys(row.policy for row in table.rows if row.budget is not None))
    if not policies:
        return ""
    drawn = {column: chart for column in table.columns if (chart := _column_chart(table, policies, column))}
    averages = [chart for column, chart in drawn.items() if column.average]
    tasks = [chart for column, chart in drawn.items() if not column.average]
    names = [(number, name) for number, name in enumerate(policies)]
    marks = "".join(f"<li>{legend_mark(number)}{escape(name)}</li>" for number, name in names)
    if table.full is not None:
        marks += f"<li>{legend_mark(None)}{escape(table.full.name)}</li>"
    parts = ["<h3>Scores against budget</h3>", f'<ul class="legend">{marks}</ul>']
    if len(tasks) > MANY:
        parts.append(_grid(averages))
        parts.append(f"<details><summary>Each of {len(tasks)} tasks</summary>{_grid(tasks)}</details>")
    else:
        parts.append(_grid([*averages, *tasks]))
    if not table.measure.traffic:
        return "".join(parts)
    traffic = [_traffic_chart(table, policies, one) for one in TRAFFIC]
    over_steps = [
        _steps_chart(table, policies, one, budget)
        for budget in dict.fromkeys(row.budget for row in table.rows if row.budget is not None)
        for one in TRAFFIC
    ]
    for title, charts in (
        ("Traffic against budget", traffic),
        ("Traffic over steps, but the first behind a prompt", over_steps),
    ):
        parts += [f"<h3>{title}</h3>", _grid(list(filter(None, charts)))] if any(charts) else []
    return "".join(parts)


def _column_chart(table: ResultsTable, policies: Sequence[str], column: Column) -> str:
    lines: dict[str, dict[int, Point]] = {name: {} for name in policies}
    for row in table.rows:
        figure = table.figures.get((row.name, column.title))
        if row.budget is not None and figure is not None:
            lines[row.policy][row.budget] = Point(figure.value, figure.interval)
    full = table.figures.get((table.full.name, column.title)) if table.full is not None else None
    title = f"{column.title} ({table.measure.what})"
    return _chart(title, lines, None if full is None else full.value, table.measure.bounds)


def _traffic_chart(table: ResultsTable, policies: Sequence[str], traffic: Traffic) -> str:
    lines: dict[str, dict[int, Point]] = {name: {} for name in policies}
    for row in table.rows:
        if row.budget is not None and (value := getattr(row, traffic.name)) is not None:
            lines[row.policy][row.budget] = Point(traffic.scale * value)
    return _chart(traffic.title, lines, None, traffic.bounds)


def _chart(title: str, lines: Lines, level: float | None, bounds: Bounds) -> str:
    if not any(lines.values()):
        return ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{line_chart(title, lines, level, bounds)}</figure>"


def _steps_chart(table: ResultsTable, policies: Sequence[str], traffic: Traffic, budget: int) -> str:
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in policies}
    for row in table.rows:
        if row.budget == budget:
            points = mean_series(row.over_steps, traffic.name)
            curves[row.policy] = [(step, traffic.scale * value) for step, value in points]
    if not any(curves.values()):
        return ""
    title = f"Budget {budget}: {traffic.title[:1].lower()}{traffic.title[1:]}"
    return f"<figure><figcaption>{escape(title)}</figcaption>{curve_chart(title, curves, traffic.bounds)}</figure>"


def _grid(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _maps(folder: RunFolder, measure: Measure) -> str:
    """Heat maps of a run and its attention-map viewer; empty for a benchmark without them."""
    try:
        maps = measure.heat_maps(folder)
        return "" if maps is None else _heat_maps(maps) + viewer(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder.path}: not results of {folder.description['benchmark']}: {error!r}") from error


def _heat_maps(maps: HeatMaps) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(panel.title)}</figcaption>"
        f'<div class="scroll" tabindex="0">{heat_map(panel, maps.axes, maps.low, maps.high)}</div></figure>'
        for panel in maps.panels
    )
    bar = colour_bar(f"{maps.low:.2f}", f"{maps.high:.2f}")
    return f'<h3>{escape(maps.title)}</h3><p>{bar}</p><div class="maps">{figures}</div>'
