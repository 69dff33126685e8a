"""Hooks of mkdocs: docstrings' roles as plain Markdown; no public name left out."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOMS = (
    "",
    ".accounting",
    ".attribution",
    ".difficulty",
    ".evaluation",
    ".gradients",
    ".integration",
    ".ledger",
    ".plotting",
    ".recording",
    ".report",
    ".symmetries",
    ".unlearning",
)


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the role before what it marks as code, as in ``:func:`sweep```."""
    return re.sub(r":(?:math|func|class|meth|mod|attr):(?=<code>)", "", html)


def on_post_build(config: Any, **_: Any) -> None:
    """Refuse a site in which a public name is not documented."""
    pages = Path(config.site_dir, "api").glob("*.html")
    places = {
        place
        for page in pages
        for place in re.findall(r'id="(opacus_pi[^"]*)"', page.read_text("utf-8"))
    }
    for module in (import_module(f"opacus_pi{room}") for room in ROOMS):
        for name in module.__all__:
            place = getattr(getattr(module, name), "__module__", module.__name__)
            home = f"{place}.{name}"
            if not {f"{module.__name__}.{name}", home} & places:
                raise PluginError(f"{home} is on no page of docs/api.")
