"""The Pareto front of points worked out by hand, and its chart."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from hf_histo.evaluation.figures.pareto import Point, chart, front

POINTS = {
    "large": Point("all", "r = 8", 800, 0.95, 0.01),
    "small": Point("all", "r = 1", 100, 0.90),
    "beaten": Point("few", "r = 8", 400, 0.90),
    "equal": Point("few", "r = 1", 100, 0.90),
    "alone": Point("alone", "", 10, 0.5),
    "larger": Point("all", "r = 16", 1600, 0.95),
    "worse": Point("few", "r = 2", 800, 0.93),
}


def test_the_front_holds_what_nothing_beats() -> None:
    assert front(POINTS) == ["alone", "small", "equal", "large"]
    assert front({"one": POINTS["worse"]}) == ["one"]
    assert front({}) == []


def test_no_point_beyond_the_front_is_unbeaten() -> None:
    for name, point in POINTS.items():
        beaten = any(
            POINTS[other].mean >= point.mean
            and POINTS[other].trainable <= point.trainable
            and (POINTS[other].mean, POINTS[other].trainable) != (point.mean, point.trainable)
            for other in front(POINTS)
        )
        assert beaten == (name not in front(POINTS))


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    for points in (POINTS, {"one": POINTS["large"]}):
        chart(points, tmp_path / "chart.png", axis="accuracy")
        with PIL.Image.open(tmp_path / "chart.png") as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(2**24) or []) > 20
