"""Self-contained HTML pages: no network and no framework; light or dark, as the reader's system is."""

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --faint: light-dark(#666, #aaa);
        --paper: light-dark(#fff, #181818); --ink: light-dark(#111, #eee); --mark: light-dark(#f3f3f3, #262626) }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; background: var(--paper); color: var(--ink) }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top }
th { position: sticky; top: 0; background: var(--mark) }
td { white-space: pre-wrap; overflow-wrap: anywhere }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
table.sortable th { cursor: pointer }
small, p.note { color: var(--faint) }
input { font: inherit; width: min(30rem, 90%); padding: .3rem .5rem }
"""
# A click on a head sorts the rows below it, a second one the other way; a field of class `filter` keeps the rows of the
# next table that contain its text.
SCRIPT = """
for (const head of document.querySelectorAll("table.sortable th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], column = head.cellIndex, sign = head.dataset.sign === "-1" ? 1 : -1;
  head.dataset.sign = sign;
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  body.append(...[...body.rows].sort((one, two) => sign * order(key(one), key(two))));
};
for (const field of document.querySelectorAll("input.filter")) field.oninput = () => {
  const wanted = field.value.toLowerCase(), body = field.closest("section").querySelector("tbody");
  for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
};
"""


def escape(text: object) -> str:
    """The text as HTML shows it, in an element or in a quoted attribute."""
    return html.escape(str(text), quote=True)


def document(title: str, body: str) -> str:
    """A whole page around its body; it may load nothing, wherever it is opened."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}\n<script>{SCRIPT}</script>\n</html>\n"
    )


def cell(content: str, value: float | None = None, number: bool = False) -> str:
    """A table's cell of HTML; `value` is what it is sorted by instead of its text."""
    kind = ' class="number"' if number else ""
    sort = "" if value is None else f' data-value="{value:.6g}"'
    return f"<td{kind}{sort}>{content}</td>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], sortable: bool = False) -> str:
    """A table of a head of plain texts and of rows of cells."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f"<table{kind}>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, the head first; all but the first column are numbers."""
    head, *rest = rows
    return table(head, [[cell(escape(text), number=i > 0) for i, text in enumerate(row)] for row in rest])
