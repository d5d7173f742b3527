"""Build the HTML of the reports: tables, pictures as data URIs, and one stylesheet for light and dark screens.

A page loads nothing and runs nothing: it has no links, fonts or scripts.
"""

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLESHEET = """
:root { color-scheme: light dark;
  --ground: #fff; --ink: #20262e; --soft: #66707c; --line: #e1e5ea; --panel: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #171717; --ink: #e2e2e2; --soft: #9b9b9b; --line: #303030; --panel: #202020; }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 2rem 1.25rem 4rem;
  background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; }
h2 { margin: 2.4rem 0 .5rem; font-size: 1.1rem; }
p { margin: .2rem 0 .6rem; color: var(--soft); }
img { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem .32rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; }
pre { padding: 1rem; overflow-x: auto; background: var(--panel); border-radius: 6px;
  font-size: .82rem; line-height: 1.45; }
summary { cursor: pointer; margin-top: 2.4rem; font-size: 1.1rem; font-weight: 600; }
"""


def html_page(title: str, subtitle: str, sections: list[str]) -> str:
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{STYLESHEET}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>",
        *sections,
        "</body>\n</html>\n",
    ])  # fmt: skip


def picture(title: str, caption: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(title)}</h2>\n<p>{escape(caption)}</p>\n{image}"


def key_value_table(title: str, values: dict[str, str]) -> str:
    return _table(title, [f"<th>{escape(key)}</th><td>{escape(value)}</td>" for key, value in values.items()])


def data_table(title: str, columns: dict[str, Callable[[Any], str]], records: Sequence[Any]) -> str:
    """One row per record. A column has a heading and a function that formats its cell of a record."""
    if not records:
        return f"<h2>{escape(title)}</h2>\n<p>None.</p>"
    heading = "".join(f"<th>{escape(name)}</th>" for name in columns)
    cells = ["".join(f"<td>{escape(cell(record))}</td>" for cell in columns.values()) for record in records]
    return _table(title, [heading, *cells])


def collapsible_text(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _table(title: str, rows: list[str]) -> str:
    return f"<h2>{escape(title)}</h2>\n<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table>"
