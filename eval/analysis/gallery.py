"""The gallery of an analysis: one self-contained HTML page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from attention_predictor.eval.analysis import map_images as pictures
from attention_predictor.eval.analysis.correlation import Correlation
from attention_predictor.eval.analysis.examples import LEAST, Example
from attention_predictor.eval.analysis.patterns import CLASSES, ECHO, FAR, FOCUS, HOLDS, RETURN
from attention_predictor.eval.analysis.summary import COMPARED, SIMILARITIES, Head, Summary
from attention_predictor.eval.display.heatmap import Axes, Panel
from attention_predictor.eval.display.html_document import document
from attention_predictor.eval.display.svg_heatmap import colour_bar, heat_map

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
NAMES = {
    "qsim_prompt_plain": "prompt's end, before RoPE",
    "qsim_prompt": "prompt's end, after RoPE",
    "qsim_steps_plain": "steps, before RoPE",
    "qsim_steps": "steps, after RoPE",
    "predictor_relative": "predictor, relative recovery",
    "predictor_far": "predictor, beyond sink and recent",
    "last_relative": "last row, relative recovery",
    "last_far": "last row, beyond sink and recent",
    "far_mass": "mass beyond sink and recent",
}
LEVELS = {"head": "query heads", "kv_head": "KV heads"}
CHANNELS = "What sets attended keys apart, in logits by RoPE wavelength"
CRITERIA = {
    "re-access": f"Vertical lines: what neighbouring steps have in common, token by token, is {HOLDS:.0%} or more of "
    "what it can be beyond chance, and more than along the diagonal",
    "sequential": f"Diagonals: the same with the earlier step moved on by one token, {HOLDS:.0%} or more and more than "
    "vertically",
    "seasonal": "Lines that repeat: diagonals whose profile over distance has at one period at least "
    f"{ECHO:.0%} more in common with itself than nearer by, or columns that come back after a period of steps by at "
    f"least {RETURN:.0%}",
    "retrieval": f"No such line, but the mass is on few tokens (no more than {1 / FOCUS:.0f}, as the inverse of the "
    "sum of squared shares)",
    "unpredictable": "None of these; also attention that is spread evenly",
}


def gallery(summary: Summary) -> str:
    """A whole HTML document."""
    title = f"Where the attention of {Path(str(summary.settings['model'])).name} can be foreseen"
    sections = (_lead(summary), _overview(summary), _scatters(summary), _patterns(summary), _settings(summary))
    body = f"<h1>{escape(title)}</h1>\n" + "\n".join(sections)
    return document(title, body, policy=_POLICY, style=pictures.STYLE)


def correlation_text(found: Correlation) -> str:
    """``0.42 [0.10, 0.66]``."""
    if found.rho is None:
        return "not defined"
    inside = "" if found.interval is None else " [{:.2f}, {:.2f}]".format(*found.interval)
    return f"{found.rho:.2f}{inside}".replace("-0.00", "0.00").replace("-", "−")


def _lead(summary: Summary) -> str:
    settings, documents = summary.settings, sum(summary.documents.values())
    name, layers = _similarity(summary), len({head.layer for head in summary.heads})
    found, of_kv = (summary.correlations[level, name, "predictor_relative"] for level in LEVELS)
    said = [
        f"{documents} documents of up to {settings['context']} tokens; the last {settings['tail']} of each, or what is "
        f"asked behind it, are the steps that are analysed. {layers} layers, {len(summary.heads)} query heads, "
        f"{len(summary.kv_heads)} KV heads.",
        f"Query similarity ({NAMES[name]}) against relative recovery of the predictor: Spearman's ρ = "
        f"<b>{correlation_text(found)}</b> over {found.pairs} query heads, <b>{correlation_text(of_kv)}</b> over "
        f"{of_kv.pairs} KV heads (95% bootstrap intervals, as if heads were independent).",
    ]
    if summary.failures:
        said.append(f"Failed and left out: {len(summary.failures)} documents; {escape(summary.failures[0])}")
    return "".join(f"<p>{one}</p>" for one in said)


def _similarity(summary: Summary) -> str:
    """Query similarity before RoPE, or after it where the rotation can't be undone."""
    plain = "qsim_prompt_plain"
    return plain if any(head.means[plain] is not None for head in summary.heads) else "qsim_prompt"


def _overview(summary: Summary) -> str:
    layers = sorted({head.layer for head in summary.heads})
    rows = [[head for head in summary.heads if head.layer == layer] for layer in layers]
    most = max(map(len, rows))
    axes = Axes([str(layer) for layer in layers], [str(number) for number in range(most)], "layer", "query head")
    kv_rows = [[heads for at, _, heads in summary.kv_heads if at == layer] for layer in layers]
    kv_axes = Axes(axes.rows, [str(number) for number in range(max(map(len, kv_rows)))], "layer", "KV head")
    tips = [[_tip(head) for head in row] for row in rows]
    class_map = pictures.class_map([[head.pattern for head in row] for row in rows], tips, axes)

    def of_heads(name: str) -> list[list[float | None]]:
        return [[head.means[name] for head in row] for row in rows]

    def of_kv_heads(name: str) -> list[list[float | None]]:
        return [[heads[0].means[name] for heads in row] for row in kv_rows]  # the same for all that share one

    similar = [name for name in ("qsim_prompt_plain", "qsim_prompt") if _known(of_heads(name))]
    recovered = ["predictor_relative", "predictor_far", "last_far"]
    return "".join(
        [
            "<h2>Layers and heads</h2>",
            f"<figure><figcaption>Pattern that most maps of a head show</figcaption>{_scroll(class_map)}</figure>",
            pictures.class_key(),
            "<h3>Query similarity</h3>",
            "<p>Mean cosine of all pairs of different queries of the window. Before RoPE is what TAPPA's theory is "
            "about; after RoPE is what attention and caches see.</p>",
            _heat_maps([(NAMES[name], of_heads(name)) for name in similar], axes),
            "<h3>Recovery</h3>",
            "<p>Attention mass on the blocks chosen ahead of a step, relative to the best choice within "
            f"{summary.settings['budget']} tokens; and of what lies beyond sink and recent alone, which are always "
            "chosen. History is told the truth at every step.</p>",
            _heat_maps([(NAMES[name], of_kv_heads(name)) for name in recovered], kv_axes),
        ]
    )


def _heat_maps(maps: Sequence[tuple[str, list[list[float | None]]]], axes: Axes) -> str:
    """Maps on one scale, from the lowest value to the highest."""
    known = [value for _, rows in maps for row in rows for value in row if value is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f"{_scroll(heat_map(Panel(title, rows), axes, low, high))}</figure>"
        for title, rows in maps
    )
    return f'<p>{colour_bar(f"{low:.2f}", f"{high:.2f}")}</p><div class="maps">{figures}</div>'


def _scatters(summary: Summary) -> str:
    similar = [name for name in NAMES if name in SIMILARITIES]
    figures = []
    for recovery in ("predictor_relative", "predictor_far"):
        for similarity in ("qsim_prompt_plain", "qsim_prompt"):
            pairs = summary.pairs("head", similarity, recovery)
            points = [
                (x, y, head.pattern, f"{_tip(head)}; {x:.2f}, {y:.3f}")
                for head, (x, y) in zip(summary.heads, pairs, strict=True)
                if x is not None and y is not None
            ]
            if points:
                title = f"ρ = {correlation_text(summary.correlations['head', similarity, recovery])}"
                across = f"query similarity, {NAMES[similarity]}"
                chart = pictures.scatter(points, x_title=across, y_title=_SHORT[recovery])
                figures.append(f"<figure><figcaption>{title}</figcaption>{chart}</figure>")
    head = "".join(f'<th scope="col">{escape(NAMES[name])}</th>' for name in COMPARED)
    lines = [
        f'<thead><tr><th class="policy" scope="col">query similarity</th><th scope="col">over</th>{head}</tr></thead>'
    ]
    for level, what in LEVELS.items():
        for place, similarity in enumerate(similar):
            cells = "".join(
                f"<td>{correlation_text(summary.correlations[level, similarity, recovery])}</td>"
                for recovery in COMPARED
            )
            name = f'<th class="policy" scope="row">{escape(NAMES[similarity])}</th><td>{what}</td>'
            lines.append(f"""<tr{" class='first'" if not place else ""}>{name}{cells}</tr>""")
    return "".join(
        [
            "<h2>Query similarity against recovery</h2>",
            "<p>A point is a query head, over all documents, its recovery that of blocks chosen for it alone; its "
            "colour is the pattern that most of its maps show. TAPPA's claim is that where queries are similar "
            "attention can be foreseen: points would rise to the right. Hold the pointer over one to see which it "
            "is.</p>",
            pictures.class_key(),
            f'<div class="pairs">{"".join(figures)}</div>',
            "<h3>Spearman's ρ, with 95% bootstrap interval</h3>",
            "<p>Over KV heads: similarity is the mean of the query heads that share one, and blocks are chosen for all "
            "of these, as the engine does. The last column is a warning: where heads of similar queries have less of "
            "their mass beyond sink and recent, they are recovered better for that alone.</p>",
            f'<div class="scroll" tabindex="0"><table class="wrapped">{"".join(lines)}</table></div>',
        ]
    )


_SHORT = {"predictor_relative": "relative recovery", "predictor_far": "recovery beyond sink, recent"}


def _patterns(summary: Summary) -> str:
    counts: Counter[str] = Counter()
    for head in summary.heads:
        counts.update(head.maps)
    total = sum(counts.values())
    parts = [
        "<h2>Patterns</h2>",
        "<p>Of each map the part beyond sink and recent is classified; of heads that look there with less than "
        f"{FAR:.0%} of their mass, all of it. {total} maps (documents, or what follows each, × heads):</p>",
        f'<div class="charts"><figure>{pictures.counts_bar(counts)}</figure></div>{pictures.class_key()}',
        "<p>In the maps below, steps go down and tokens across. Colours are logarithmic:</p>",
        f"<p>{colour_bar(f'{LEAST:g}', '1')}</p>{pictures.kind_key()}",
    ]
    for name in CLASSES:
        share = f"{counts[name]} of {total} maps" if total else "no maps"
        parts.append(f"<h3>{name}: {share}</h3><p>{escape(CRITERIA[name])}.</p>")
        if not summary.examples[name]:
            parts.append('<p class="quiet">None of these documents shows it in this model.</p>')
        parts += [_example(summary, where, example) for where, example in summary.examples[name]]
        parts.append(_channels(summary, name))
    return "".join(parts)


def _example(summary: Summary, where: str, example: Example) -> str:
    head = example.head
    last = example.first_token + example.near.columns - 1
    tokens = 1 / head["focus"]
    told = (
        f"Layer {head['layer']}, head {head['head']}; {escape(where)}. Vertical {_percent(head['vertical'])}, diagonal "
        f"{_percent(head['diagonal'])}, on {tokens:.{int(tokens < 10)}f} tokens; {_percent(head['far_mass'])} of the "
        f"mass beyond sink and recent{'' if head['part'] == 'far' else ', so that the whole map is classified'}."
    )
    if head["period"]:
        told += f" Period: {head['period']} {head['period_unit']}."
    found = f" The predictor's relative recovery is {head['predictor_relative']:.3f}"
    if head["predictor_far"] is not None:
        found += f", beyond sink and recent {head['predictor_far']:.3f}"
    if head["qsim_prompt_plain"] is not None:
        found += f"; query similarity before RoPE {head['qsim_prompt_plain']:.2f}"
    pooled = f"{example.blocks_a_column} blocks a column" if example.blocks_a_column > 1 else "a block a column"
    figures = [
        (f"Tokens {example.first_token} to {last}", pictures.attention_image(example, "near")),
        (f"The whole context, {pooled}", pictures.attention_image(example, "whole")),
        ("The same, and what the predictor chose ahead for its KV head", pictures.choice_image(example)),
    ]
    if head["channels"] is not None and head["layer"] in summary.wavelengths:
        bars = pictures.channel_bars(head["channels"], summary.wavelengths[head["layer"]], head["pattern"])
        figures.insert(1, (CHANNELS, bars))
    drawn = "".join(f"<figure><figcaption>{text}</figcaption>{picture}</figure>" for text, picture in figures)
    return f'<p class="quiet">{told}{found}.</p><div class="maprow">{drawn}</div>'


def _channels(summary: Summary, name: str) -> str:
    """Mean over all heads that show a pattern."""
    heads = [head for head in summary.heads if head.pattern == name and head.channels is not None]
    if not heads:
        return ""
    wavelengths = summary.wavelengths[heads[0].layer]
    same = [head.channels for head in heads if head.channels and summary.wavelengths[head.layer] == wavelengths]
    mean = [sum(of_pair) / len(same) for of_pair in zip(*same, strict=True)]
    bars = pictures.channel_bars(mean, wavelengths, name)
    title = f"{CHANNELS}; mean over {len(same)} heads"
    return f'<div class="charts"><figure><figcaption>{title}</figcaption>{bars}</figure></div>'


def _settings(summary: Summary) -> str:
    lines = [f"{name}: {value}" for name, value in summary.settings.items()]
    lines += [f"documents of {name}: {count}" for name, count in summary.documents.items()]
    lines += summary.failures
    text = escape("\n".join(lines))
    return f'<details><summary>Settings</summary><div class="scroll"><pre>{text}</pre></div></details>'


def _tip(head: Head) -> str:
    shares = ", ".join(f"{name} {head.maps[name]}" for name in CLASSES if head.maps.get(name))
    period = f", period {head.period:g} {head.period_unit}" if head.period is not None else ""
    return f"layer {head.layer}, head {head.head}: {head.pattern}{period}; maps: {shares}"


def _known(rows: Sequence[Sequence[float | None]]) -> bool:
    return any(value is not None for row in rows for value in row)


def _percent(share: float) -> str:
    return f"{round(100 * share)}%".replace("-", "−")


def _scroll(drawing: str) -> str:
    return f'<div class="scroll" tabindex="0">{drawing}</div>'
