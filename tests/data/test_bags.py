"""Bags of a table: its groups, or the slides of its patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from miniature import write_bags
from slide_files import write_slides

from hf_histo.data import bags, schema
from hf_histo.data.load import load
from hf_histo.errors import HistoError


def table(rows: list[tuple[str, int, int, str]]) -> datasets.Dataset:
    columns: dict[str, Any] = dict(
        zip(("id", "label", "center", "group"), map(list, zip(*rows, strict=True)), strict=True)
    )
    image = [{"bytes": None, "path": "a"}] * len(rows)
    return datasets.Dataset.from_dict({**columns, "image": image}, features=schema.features(["normal", "tumor"], []))


def test_bags_are_groups_in_the_order_of_their_first_images() -> None:
    rows = [("1", 1, 0, "b"), ("2", 0, 0, "a"), ("3", 1, 2, "b"), ("4", -1, 1, "c"), ("5", 0, 0, "a")]
    found = bags.find(table(rows))
    assert (found.names, found.groups) == (["b", "a", "c"], ["b", "a", "c"])
    assert found.labels.tolist() == [1, 0, -1]
    assert found.centers.tolist() == [-1, 0, 1]  # those of b are two
    assert [part.tolist() for part in found.rows] == [[0, 2], [1, 4], [3]]
    assert bags.find(table(rows), [5, 6, 5, 7, 6]).labels.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("1", 0, 0, "a"), ("2", 0, 0, "")], "1 of 2 images are of no group.*--group_column"),
        ([("1", 0, 0, "a"), ("2", 1, 0, "a")], "group 'a' has images of 'normal' and of 'tumor', expected one label"),
        ([("1", 0, 0, "a"), ("2", -1, 0, "a")], "group 'a' has images of 'normal' and of 'hidden'"),
    ],
)
def test_what_is_no_bag(rows: list[tuple[str, int, int, str]], message: str) -> None:
    with pytest.raises(HistoError, match=message):
        bags.find(table(rows))


def test_bags_of_files(tmp_path: Path) -> None:
    data = load(write_bags(tmp_path / "bags"))
    found = bags.find(data["train"])
    assert len(found) == 12
    assert np.bincount(found.of_row).tolist() == [6] * 12
    assert found.labels.tolist() == [0, 1] * 6


def test_a_bag_is_a_slide_and_its_group_the_patient(tmp_path: Path) -> None:
    slides = write_slides(tmp_path / "slides")
    lines = slides.read_text().splitlines()
    same = [f"{line.split(',')[0]},{'normal' if n % 2 else 'tumor'},p{n // 4},A" for n, line in enumerate(lines[1:])]
    slides.write_text("\n".join([lines[0], *same]) + "\n")
    found = bags.find(load(slides, patch_size=64, annotations_column="none")["full"])
    assert found.names == [f"s{number}" for number in range(6)]
    assert found.groups == ["p0"] * 4 + ["p1"] * 2
    assert found.labels.tolist() == [1, 0] * 3
    # With their annotations, patches of a slide have two labels.
    with pytest.raises(HistoError, match=r"slide 's0' has images of .* leave its annotations out by --annotations_col"):
        bags.find(load(slides, patch_size=64)["full"])
