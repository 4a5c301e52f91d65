"""The frame and style sheet of HTML pages, light or dark as the reader's system."""

from html import escape

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c1e21; --quiet: #5c626b; --rule: #d9dce1; --tint: #f4f5f7;
  --s0: #0060a8; --s1: #c4500a; --s2: #007a57; --s3: #a83a7c; --s4: #8a6a00; --s5: #2a7fb0; --s6: #6a4bc0;
  --s7: #555b63; --both: #2a7fb0; --extra: #e69f00; --missed: #d4357f }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --ink: #e6e8eb; --quiet: #a0a7b0; --rule: #363b42; --tint: #1e2125;
    --s0: #5fb0f0; --s1: #f2935a; --s2: #4ecba0; --s3: #e58fc2; --s4: #e0bb4a; --s5: #9fd3f5; --s6: #b39bf5;
    --s7: #b4bac2; --both: #5fb0f0; --extra: #f0b840; --missed: #f070ac }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; margin: 0 0 .5rem } h2 { font-size: 1.25rem; margin: 3rem 0 .75rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem } h2, h3 { line-height: 1.3 }
p, li { max-width: 46rem } .quiet, .notes { color: var(--quiet); font-size: .875rem } .notes { padding-left: 1.1rem }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .65rem; text-align: right; vertical-align: top; white-space: nowrap }
thead th { border-bottom: 2px solid var(--rule); vertical-align: bottom }
tbody tr.first > * { border-top: 1px solid var(--rule) } tbody th { font-weight: 400; text-align: left }
th.policy { position: sticky; left: 0; text-align: left; background: var(--ground) }
@media (max-width: 40rem) { th, td { padding: .35rem .4rem } }
.average { background: var(--tint) }
td small { display: block; color: var(--quiet); font-size: .75rem; line-height: 1.35 }
.charts { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0; min-width: 0 } figcaption { font-size: .875rem; margin-bottom: .25rem }
.charts svg { display: block; width: 100%; max-width: 30rem; height: auto }
.maps { display: flex; flex-wrap: wrap; gap: 1rem 2rem } .maps figure { max-width: 100% } .maps svg { display: block }
svg text { font-size: 13px; fill: var(--ink) } svg .grid { stroke: var(--rule) }
svg .zero { stroke: var(--quiet) } svg .none { fill: var(--rule) }
svg .level { stroke: var(--quiet); stroke-width: 2; stroke-dasharray: 6 4 }
svg g[class] > path { fill: none; stroke: currentColor; stroke-width: 2 } svg g.again > path { stroke-dasharray: 3 3 }
svg g[class] > path.whisker { stroke-width: 1.2; opacity: .55; stroke-dasharray: none }
svg g.curve > path { stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round }
svg g[class] path.marker { fill: currentColor; stroke: none }
.s0 { color: var(--s0) } .s1 { color: var(--s1) } .s2 { color: var(--s2) } .s3 { color: var(--s3) }
.s4 { color: var(--s4) } .s5 { color: var(--s5) } .s6 { color: var(--s6) } .s7 { color: var(--s7) }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: .5rem 0; list-style: none;
  font-size: .875rem } .legend svg { width: 30px; height: 14px; margin-right: .4rem; vertical-align: -2px }
.viewer .choices { display: flex; flex-wrap: wrap; gap: .5rem 1rem; max-width: none } .viewer select { font: inherit }
.viewer canvas { display: block } .viewer output { display: block; font-size: .875rem; min-height: 3em;
  margin-top: .5rem }
.viewer .legend span { display: inline-block; width: 18px; height: 8px; margin-right: .4rem }
.both { background: var(--both) } .extra { background: var(--extra) } .missed { background: var(--missed) }
details { margin-top: 1rem } summary { cursor: pointer } pre { font-size: .8rem; margin: .5rem 0 }
"""


def document(title: str, body: str, *, policy: str, style: str = "") -> str:
    """A whole HTML document.

    Args:
        title: Plain text.
        policy: Content security policy.
        style: Rules in addition to ``STYLE``.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
