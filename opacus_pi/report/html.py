"""A few pieces of HTML; every text that goes in is escaped here and nowhere else.

>>> tag("p", text("a < b"), title='"')
'<p title="&quot;">a &lt; b</p>'
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Sequence[Any]


def text(value: Any) -> str:
    """A value as escaped text; numbers with four digits, nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float | np.floating):
        return html.escape(f"{value:.4g}".replace("inf", "∞"))
    return html.escape(str(value))


def tag(name: str, content: str, **attributes: str) -> str:
    """An element around content that is HTML already."""
    given = "".join(
        f' {key.replace("_", "-").strip("-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{content}</{name}>"


def paragraph(words: str, **attributes: str) -> str:
    """A paragraph of plain text."""
    return tag("p", text(words), **attributes)


def section(title: str, *parts: str) -> str:
    """A section with a heading."""
    return tag("section", tag("h2", text(title)) + "\n" + "\n".join(parts))


def table(caption: str, header: Row, rows: Sequence[Row]) -> str:
    """A table whose first column names the row; it scrolls where it is too wide."""
    head = "".join(tag("th", text(name), scope="col") for name in header)
    body = "\n".join(
        tag(
            "tr",
            tag("th", text(first), scope="row")
            + "".join(tag("td", text(cell)) for cell in rest),
        )
        for first, *rest in rows
    )
    inner = (
        tag("caption", text(caption))
        + tag("thead", tag("tr", head))
        + tag("tbody", body)
    )
    return tag(
        "div",
        tag("table", inner),
        class_="wide",
        role="region",
        tabindex="0",
        aria_label=caption,
    )


def bullets(entries: Sequence[tuple[str, str, str]], **attributes: str) -> str:
    """A list whose entries are a few strong words, a sentence, and a remark."""
    items = "\n".join(
        tag(
            "li",
            f"{tag('strong', text(strong))} {text(sentence)} "
            + tag("span", text(f"({remark})"), class_="note"),
        )
        for strong, sentence, remark in entries
    )
    return tag("ul", items, **attributes)


def facts_list(facts: Mapping[str, Any]) -> str:
    """Names and values."""
    rows = "".join(
        tag("div", tag("dt", text(name)) + tag("dd", text(value)))
        for name, value in facts.items()
    )
    return tag("dl", rows)


def pictures(drawn: Mapping[str, str]) -> str:
    """Figures side by side where there is room, each with its description."""
    figures = "\n".join(
        tag(
            "figure",
            f'<img src="{html.escape(address)}" alt="{html.escape(caption)}">'
            + tag("figcaption", text(caption)),
        )
        for caption, address in drawn.items()
    )
    return tag("div", figures, class_="figures") if drawn else ""


def page(title: str, body: str) -> str:
    """A whole document that loads nothing."""
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="robots" content="noindex">\n'
        '<meta name="generator" content="opacus_pi">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_MAY_LOAD}">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{tag('h1', text(title))}\n{body}\n</main>\n</body>\n</html>\n"
    )


_MAY_LOAD = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --page: #fff; --soft: #595959;
  --line: #d5d5d5; --band: #f5f5f5; --warn: #fff4e0; --edge: #b35c00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --page: #161616;
  --soft: #ababab; --line: #444; --band: #222; --warn: #3a2a10; --edge: #e0913a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h3 { font-size: 1rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
.warning { background: var(--warn); border-left: .3rem solid var(--edge);
  padding: .6rem 1rem; }
.note, figcaption, caption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; min-width: min(100%, 26rem);
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
thead th { vertical-align: bottom; min-width: 4.5rem; overflow-wrap: normal; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; }
th:first-child { text-align: left; }
.conditions { padding-left: 1.2rem; }
.conditions li { margin: .3rem 0; }
thead th { background: var(--band); }
dl { display: grid; gap: .3rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
dl div { display: flex; justify-content: space-between; gap: 1rem;
  border-bottom: 1px solid var(--line); }
dt { color: var(--soft); flex: none; max-width: 75%; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; }
img { width: 100%; height: auto; background: #fff; border-radius: .2rem; }
@media (prefers-color-scheme: dark) { img { filter: invert(.91) hue-rotate(180deg); } }
@media (max-width: 30rem) { main { padding: .6rem; } table { font-size: .85rem; }
  th, td { padding: .2rem .3rem; } thead th { min-width: 0; } }
@media print { .wide { overflow: visible; } section { break-inside: avoid; } }
"""
