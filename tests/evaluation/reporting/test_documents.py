"""Figures as parts of a page."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import documents, report


def figure(folder: Path, name: str) -> Path:
    logits = np.array([-2.0, -1, 1, 3])
    names = ["<script>alert(1)</script>-->", "a & b"]
    table = Predictions.make(list("abcd"), [0] * 4, [""] * 4, [0, 0, 1, 0], logits).with_label_names(names)
    folder.mkdir(exist_ok=True)
    report.confusion_matrix(table, folder / name, vector=True)
    return folder / name


def inline(path: Path, label: str) -> str:
    return documents.render("figure.html", path=path, caption=label)


def test_a_figure_is_drawn_in_the_page_with_a_text_alternative(tmp_path: Path) -> None:
    page = inline(figure(tmp_path, "confusion_val.png"), 'Confusion of "val" & <b>')
    drawn = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert drawn.attrib["role"] == "img"
    assert drawn.attrib["aria-label"] == 'Confusion of "val" & <b>'
    assert drawn.attrib["viewBox"]
    assert not [part for part in drawn.iter() if part.tag.endswith(("image", "script", "metadata"))]
    assert "<img" not in page and "<b>" not in page and "<script" not in page and "<!--" not in page


def test_two_figures_share_no_id_and_refer_to_their_own(tmp_path: Path) -> None:
    pages = [inline(figure(tmp_path, name), "") for name in ("confusion_val.png", "confusion_test.png")]
    ids = [re.findall(r'\bid="([^"]+)"', page) for page in pages]
    assert not set(ids[0]) & set(ids[1])
    for page, known in zip(pages, ids, strict=True):
        assert len(known) == len(set(known))
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
        assert used and {a or b for a, b in used} <= set(known)


def test_the_same_figure_has_the_same_bytes_and_no_date(tmp_path: Path) -> None:
    one, other = (figure(tmp_path / name, "a.png").with_suffix(".svg").read_bytes() for name in ("one", "other"))
    assert one == other
    assert b"date" not in one


def test_a_figure_without_a_drawing_is_embedded_as_it_is(tmp_path: Path) -> None:
    path = figure(tmp_path, "photographs.png")
    path.with_suffix(".svg").unlink()
    page = inline(path, "x < y")
    assert '<img src="data:image/png;base64,' in page and 'alt="x &lt; y"' in page and "<svg" not in page
