"""One HTML page that stands alone: its style, its tables and its frame. No script, no font, no file from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from ..decide.files import replaced

STYLE = """
:root{--ink:#1b1b1b;--quiet:#555;--paper:#fff;--grid:#e2e2e2;--box:#f5f5f3;--cell:#0b4f8a;--on-deep:#fff;
--c0:#0072b2;--c1:#b34700;--c2:#00795a;--c3:#a8447f;--c4:#7a5a00;--c5:#444}
@media (prefers-color-scheme:dark){:root{--ink:#ececec;--quiet:#b4b4b4;--paper:#16181b;--grid:#33373c;--box:#212429;
--cell:#6cb8f0;--on-deep:#0b1116;--c0:#56b4e9;--c1:#f08a3c;--c2:#3fc79a;--c3:#e79ac8;--c4:#f0c24a;--c5:#c8c8c8}}
html{background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
body{max-width:820px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.15rem;margin-top:2.2rem}
p.lead{font-size:1.1rem}p.note,figcaption{color:var(--quiet);font-size:.9rem}
figure{margin:1rem 0}svg{width:100%;height:auto;font:13px system-ui,sans-serif}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.3rem .7rem;text-align:right;border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left}th{color:var(--quiet);font-weight:600}
pre{background:var(--box);padding:.8rem 1rem;overflow-x:auto;border-radius:4px;font-size:.9rem}
svg text{fill:var(--ink)}svg text.note,svg text.name{font-size:12px}svg text.note{fill:var(--quiet)}svg .grid{stroke:var(--grid)}
svg .line{fill:none;stroke-width:2.2;stroke-linejoin:round}svg .faint{stroke-width:1;opacity:.4}
svg .lead{stroke-width:.8;opacity:.6}svg .mark{stroke:var(--ink);stroke-dasharray:5 4}svg .level{stroke:var(--quiet);stroke-dasharray:2 3}
svg .cell{fill:var(--cell)}svg .dense{fill:var(--grid)}svg text.on-deep{fill:var(--on-deep)}svg .before{fill:var(--quiet)}svg .after{fill:var(--c0)}
""" + "".join(
    f"svg .line.s{i},svg .lead.s{i}{{stroke:var(--c{i})}}svg .dot.s{i},svg text.s{i}{{fill:var(--c{i})}}"
    for i in range(6)
)


def page(title: str, lead: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A whole document. lead: one sentence under the title. sections: (heading, parts in HTML); those without parts are left out."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{''.join(parts)}" for heading, parts in sections if parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>{body}</body></html>\n'
    )


def paragraph(words: str, quiet: bool = False) -> str:
    """Text."""
    return f"<p{' class=note' if quiet else ''}>{html.escape(words)}</p>"


def figure(svg: str, caption: str) -> str:
    """A picture with a line under it."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header; on a narrow screen it scrolls by itself."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def code(text: str) -> str:
    """A block of code."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def write(path: str | Path | None, text: str) -> str:
    """Write the page whole or not at all, where a path is given; returns it."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replaced(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")
    return text
