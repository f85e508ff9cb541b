"""The distance of an image's color from that of the training centers."""

from __future__ import annotations

import json
from dataclasses import asdict

import datasets
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from hf_histo.data.schema import ImageTable, encode_ppm, features
from hf_histo.transforms.color_shift import ColorRange


def table(colors: dict[int, tuple[int, int, int]], count: int = 60) -> ImageTable:
    """`count` images of each center, of its color with noise between and within them."""
    random = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for center, color in colors.items():
        for i in range(count):
            shade = np.array(color) + random.normal(0, 6, 3)
            pixels = np.clip(shade + random.normal(0, 20, (8, 9, 3)), 0, 255).astype(np.uint8)
            image = {"bytes": encode_ppm(pixels), "path": None}
            rows.append({"id": f"{center}-{i}", "image": image, "label": 0, "center": center, "group": ""})
    return ImageTable(datasets.Dataset.from_list(rows, features=features(["a", "b"])))


def test_a_percent_of_the_training_images_and_every_other_color_are_beyond_the_limit() -> None:
    train = table({0: (180, 120, 170), 3: (120, 150, 90)})
    colors = ColorRange.fit(train)
    distances = [colors.distance(train[row]["image"]) for row in range(len(train))]
    assert np.mean(np.array(distances) > colors.limit) == pytest.approx(0.01, abs=0.01)
    unusual = table({7: (150, 20, 20)})
    assert min(colors.distance(unusual[row]["image"]) for row in range(len(unusual))) > colors.limit
    between = torch.full((3, 8, 8), 140, dtype=torch.uint8)  # between the two centers, and of neither
    assert colors.distance(between) > colors.limit


def test_the_distance_is_that_of_the_definition() -> None:
    colors = ColorRange({"0": ([0.5] * 6, [0.1] * 6), "1": ([0.0] * 6, [0.2] * 6)}, 1.0)
    flat = torch.full((3, 4, 4), 51, dtype=torch.uint8)  # mean 0.2, deviation 0
    assert colors.distance(flat) == pytest.approx(np.sqrt((3 * 1.0**2 + 0) / 6))


def test_it_survives_json_and_a_blank_center() -> None:
    colors = ColorRange.fit(table({0: (180, 120, 170)}, count=3))
    again = TypeAdapter(ColorRange).validate_json(json.dumps(asdict(colors)))
    image = torch.full((3, 4, 4), 51, dtype=torch.uint8)
    assert again.distance(image) == colors.distance(image)


@pytest.mark.parametrize(
    "content",
    [{"centers": {}, "limit": 1}, {"centers": {"0": [[0] * 6, [0] * 6]}, "limit": 1}, {"centers": [1], "limit": 1},
     {"centers": {"0": [[0] * 6, [1] * 6]}, "limit": None}, {"centers": {"0": [[0] * 5, [1] * 6]}, "limit": 1}],
)  # fmt: skip
def test_anything_else_is_invalid(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(ColorRange).validate_json(json.dumps(content))
