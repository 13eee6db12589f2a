"""What mkdocs calls while it builds the site: equations become MathML, which browsers show without scripts."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **unused: Any) -> str:
    """The page's HTML with MathML for what arithmatex left as TeX."""
    return _EQUATION.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    block = found[1] == "div"
    tex = html.unescape(found[2]).strip()[2:-2]  # without \( \) or \[ \]
    made = convert(tex, display="block" if block else "inline")
    return f'<div style="margin: 1.2em 0; overflow-x: auto">{made}</div>' if block else made
