"""Convert LaTeX in the pages to MathML while the site is built, which needs no script; keep 0.1 ± 0.2 on one line."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

# The output of pymdownx.arithmatex for $...$ and $$...$$.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas and the spaces around ± in the HTML of a page; mkdocs calls this for every page."""

    def mathml(formula: re.Match[str]) -> str:
        block = formula[1] == "div"
        element = convert(html.unescape(formula[2]).strip(), display="block" if block else "inline")
        return f'<div class="formula">{element}</div>' if block else element

    return _FORMULA.sub(mathml, content).replace(" ± ", "&nbsp;±&nbsp;")
