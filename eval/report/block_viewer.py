"""The attention-map viewer: a document's blocks by step, true attention next to the blocks read.

Its data are texts of one letter a block (``block_map``), as they stand in the results; a script draws the rows of the
layer and head that are chosen. The page's content security policy allows only this script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape

from attention_predictor.eval.benchmarks.recovery.block_map import BEST, LETTERS, LEVELS, READ
from attention_predictor.eval.display.svg_heatmap import RAMP
from attention_predictor.eval.harness.run_folder import RunFolder

_SCRIPT = """
for (const viewer of document.querySelectorAll('.viewer')) {
  const maps = JSON.parse(viewer.querySelector('script').textContent);
  const [task, variant, layer, head] = viewer.querySelectorAll('select');
  const canvas = viewer.querySelector('canvas'), said = viewer.querySelector('output');
  const pen = canvas.getContext('2d'), code = new Map([...LETTERS].map((letter, number) => [letter, number]));
  const TALL = 18, STRIP = 6, LEFT = 34, BOTTOM = 22;
  let wide = 4;
  const fill = (select, names) => {
    const before = select.value;
    select.replaceChildren(...names.map(([value, name]) => new Option(name, value)));
    if (names.some(([value]) => String(value) === before)) select.value = before;
  };
  const shown = () => maps[task.value][variant.value];
  const rows = () => shown().rows[layer.value][head.value];
  const colour = level => {
    const place = level / (LEVELS - 1) * (RAMP.length - 1), first = Math.min(Math.floor(place), RAMP.length - 2);
    const mixed = RAMP[first].map((start, i) => Math.round(start + (RAMP[first + 1][i] - start) * (place - first)));
    return `rgb(${mixed})`;
  };
  const draw = () => {
    const style = getComputedStyle(viewer), of = rows();
    const blocks = Math.max(...of.map(row => row.length));
    const room = viewer.querySelector('.scroll').clientWidth - LEFT - 2;
    wide = Math.max(3, Math.min(12, Math.floor(room / blocks)));
    const width = LEFT + wide * blocks + 2, height = TALL * of.length + BOTTOM, sharp = devicePixelRatio || 1;
    canvas.width = width * sharp; canvas.height = height * sharp;
    canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
    pen.scale(sharp, sharp);
    pen.font = '12px system-ui, sans-serif';
    pen.textBaseline = 'middle';
    const ink = style.getPropertyValue('--ink');
    const marks = ['', '--extra', '--missed', '--both'].map(name => name && style.getPropertyValue(name));
    of.forEach((row, step) => {
      pen.fillStyle = ink; pen.textAlign = 'right';
      pen.fillText(shown().steps[step], LEFT - 5, TALL * (step + .5));
      [...row].forEach((letter, block) => {
        const what = code.get(letter), x = LEFT + wide * block, y = TALL * step;
        pen.fillStyle = colour(what & (LEVELS - 1));
        pen.fillRect(x, y, wide - (wide > 4 ? 1 : 0), TALL - STRIP - 1);
        const mark = marks[(what & READ ? 1 : 0) + (what & BEST ? 2 : 0)];
        if (mark) { pen.fillStyle = mark; pen.fillRect(x, y + TALL - STRIP - 1, wide - (wide > 4 ? 1 : 0), STRIP - 1); }
      });
    });
    pen.fillStyle = ink;
    const size = shown().block_size, every = Math.max(1, 2 ** Math.ceil(Math.log2(90 / wide)));
    for (let block = 0; block < blocks; block += every) {
      pen.textAlign = block ? 'center' : 'left';
      pen.fillText(block * size, LEFT + wide * (block + (block ? .5 : 0)), TALL * of.length + BOTTOM / 2);
    }
    let read = 0, best = 0, both = 0;
    for (const row of of) for (const letter of row) {
      const what = code.get(letter);
      read += !!(what & READ); best += !!(what & BEST); both += (what & READ) && (what & BEST) ? 1 : 0;
    }
    said.textContent = `Of ${best} blocks that would have been best, ${both} were read, and ${read - both} others.`;
  };
  const tell = event => {
    const box = canvas.getBoundingClientRect();
    const block = Math.floor((event.clientX - box.left - LEFT) / wide);
    const step = Math.floor((event.clientY - box.top) / TALL);
    const letter = rows()[step]?.[block];
    if (letter === undefined) return;
    const what = code.get(letter), level = what & (LEVELS - 1), size = shown().block_size;
    const mass = level ? `${(100 * 2 ** (level - LEVELS)).toPrecision(1)} % of the mass at least` : 'next to no mass';
    said.textContent = `Step ${shown().steps[step]}, tokens ${block * size} to ${(block + 1) * size - 1}: ${mass}; `
      + (what & READ ? 'read' : 'not read') + (what & BEST ? ', among the best' : ', not among the best');
  };
  const choose = () => {
    fill(variant, Object.keys(maps[task.value]).map(name => [name, name]));
    fill(layer, shown().layers.map((number, place) => [place, number]));
    fill(head, shown().rows[0].map((_, number) => [number, number]));
    draw();
  };
  fill(task, Object.keys(maps).map(name => [name, name]));
  [task, variant].forEach(select => select.addEventListener('change', choose));
  [layer, head].forEach(select => select.addEventListener('change', draw));
  canvas.addEventListener('pointermove', tell);
  canvas.addEventListener('pointerdown', tell);
  addEventListener('resize', draw);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  choose();
}
"""
_CONSTANTS = {"LETTERS": LETTERS, "LEVELS": LEVELS, "READ": READ, "BEST": BEST, "RAMP": RAMP}
SCRIPT = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in _CONSTANTS.items()) + _SCRIPT
MARKS = {"both": "read, and among the best", "extra": "read, not among the best", "missed": "among the best, not read"}


def script_source() -> str:
    """The script's hash for the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"


def viewer(folder: RunFolder) -> str:
    """The viewer for a run's block maps; empty if no record has one."""
    maps: dict[str, dict[str, object]] = {}
    for task in folder.tasks:
        for variant in folder.variants:
            for record in folder.records(variant, task):
                if "map" in record:
                    maps.setdefault(task, {})[variant] = record["map"]
    if not maps:
        return ""
    data = json.dumps(maps).replace("<", "\\u003c")  # nothing in it ends the element
    chosen = "".join(f"<label>{name} <select></select></label>" for name in ("text", "policy", "layer", "KV head"))
    marks = "".join(f'<li><span class="{name}"></span>{escape(what)}</li>' for name, what in MARKS.items())
    return (
        "<h3>Attention map: true blocks and those read</h3>"
        '<p class="quiet">A row is a decoding step of the first document, a column a block. Colour: the block’s share '
        "of the true attention, from dark (next to none) to light (half or more), on a scale of powers of two. The "
        "strip below it: what the policy read, and what the best selection within the budget would have.</p>"
        f'<div class="viewer"><script type="application/json">{data}</script><p class="choices">{chosen}</p>'
        f'<ul class="legend">{marks}</ul><div class="scroll" tabindex="0"><canvas role="img" '
        'aria-label="blocks across, decoding steps down"></canvas></div><output></output>'
        "<noscript>The map is drawn by a script, which is switched off here.</noscript></div>"
    )
