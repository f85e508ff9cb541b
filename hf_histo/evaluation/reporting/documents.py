"""Rendering of the model card (Markdown) and report.html from the templates in `templates/`.

All values are escaped for the format of the template, so that class names may contain any characters.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from hf_histo.evaluation.reporting import report


def render(template: str, **facts: Any) -> str:
    """Render `templates/TEMPLATE` with `facts`; deterministic. Raises jinja2's `UndefinedError` for a missing fact."""
    environment = Environment(
        loader=PackageLoader("hf_histo.evaluation.reporting"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cell": report.cell,
        "class_rows": report.class_rows,
        "center_rows": report.center_rows,
        "embedded": _embedded,
        "inline": _inline,
        "marked": report.marked,
        "plain": plain,
        "plain_rows": lambda rows: [[plain(x) if isinstance(x, str) else x for x in row] for row in rows],
        "robustness_rows": report.robustness_rows,
        "screening": report.screening,
        "section": _section,
        "size_rows": report.size_rows,
        "table": report.table,
        "transductive": report.transductive,
        "withheld": report.withheld,
        "yaml": lambda options: yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True).rstrip(),
    }
    environment.tests["wide"] = _is_wide
    return environment.get_template(template).render(facts)


def _section(figure: str) -> str:
    """The section of the report that a figure belongs to, by the first word of its name; "" for all others."""
    word = figure.split("_")[0]
    return word if word in ("roc", "confusion", "worst", "reliability", "training") else ""


def _embedded(figure: Path) -> str:
    """A PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode('ascii')}"


def _inline(figure: Path, label: str) -> Markup:
    """The SVG beside a PNG, for a page with other ones: ids start with the name of the figure; "" without an SVG.

    Args:
        figure: path of the PNG.
        label: text alternative.
    """
    path = figure.with_suffix(".svg")
    if not path.is_file():
        return Markup("")
    drawn = path.read_text(encoding="utf-8").replace("\n", " ")
    drawn = re.sub(r"<!--.*?-->", "", drawn[drawn.index("<svg") :])
    prefix = re.sub(r"[^\w-]", "_", figure.stem)
    drawn = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{prefix}-", drawn)
    return Markup(drawn.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _is_wide(figure: Path) -> bool:
    """Whether a PNG is too wide to be read on a phone without scrolling: more than 9 inches at 150 dpi.

    https://www.w3.org/TR/png-3/#11IHDR: the width is in bytes 16 to 19.
    """
    return int.from_bytes(figure.read_bytes()[16:20], "big") > 9 * 150


def plain(text: object) -> str:
    """Escape text for Markdown (https://spec.commonmark.org/0.31.2/#backslash-escapes), on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$])", r"\\\1", " ".join(str(text).split()))
