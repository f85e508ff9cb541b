"""The sidecar of an adapter folder, valid, older and damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from adapter_folders import refusal

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.transforms.augmentation import TestTimeViews


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '"text"', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_an_unreadable_sidecar(adapter: Path, content: str) -> None:
    (adapter / "hf_histo.json").write_text(content, encoding="utf-8")
    assert "hf_histo.json" in refusal(adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "magic"),
        ("batch_norm", None),
        ("label_names", "normal"),
        ("label_names", ["one"]),
        ("label_names", [0, 1]),
        ("label_names", ["tumor", "tumor"]),
        ("adapt_batch_norm", "no"),
        ("adapt_batch_norm", 0),
        ("bare", "yes"),
        ("thresholds", {"validation": "0.5"}),
        ("thresholds", {"validation": True}),
        ("threshold", "0.5"),
        ("versions", {"torch": 2}),
        ("head", {"widths": [8.0]}),
        ("head", {"widths": [], "softmax": "no"}),
        ("head", {"widths": [], "more": 1}),
        ("colors", {"centers": {}, "limit": 1}),
        ("normalizer", {"method": "rgb", "reference": [["0", "0", "0"], [1, 0, 0], [0, 1, 0], [0, 0, 1]]}),
        ("normalizer", {"method": "rgb", "reference": [[True, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]}),
        ("views", {"count": 10**9, "augmentation": "flips"}),
        ("views", {"count": 65, "augmentation": "flips"}),
        ("views", {"count": True}),
        ("views", True),
        ("views", {"count": 8, "more": 1}),
        ("num_outputs", 7),
        ("num_outputs", "1"),
        ("backbone", "resnet50"),
        ("backbone", {"name": "resnet50"}),
        ("threshold", 1.5),
        ("threshold", float("nan")),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("preprocessing", None),
        ("preprocessing", {"image_size": 32}),
        ("views", 3),
        ("views", {"count": 8, "augmentation": "magic"}),
        ("views", {"count": 8, "augmentation": []}),
        ("views", {"seed": "0"}),
        ("unknown", 1),
    ],
)
def test_a_sidecar_with_an_invalid_value(adapter: Path, key: str, value: object) -> None:
    file = adapter / "hf_histo.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}), encoding="utf-8")
    assert "hf_histo.json" in refusal(adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_size", "32"), ("image_size", -1), ("image_size", 0), ("image_size", 4096), ("resize_size", 10**5),
     ("image_size", True), ("image_size", 32.0), ("mean", ["0.5"] * 3), ("mean", [float("inf")] * 3),
     ("preparation", {"crop_to_brain": "no"}), ("preparation", {"gray": 1}), ("gray_bits", 12.5), ("unknown", 1),
     ("resize_size", 8), ("interpolation", "magic"), ("std", [0, 1, 1]),
     ("mean", [0.5]), ("fit", "magic"), ("preparation", {"contrast": "magic"}), ("preparation", {"unknown": True})],
)  # fmt: skip
def test_a_sidecar_with_invalid_preprocessing(adapter: Path, key: str, value: object) -> None:
    file = adapter / "hf_histo.json"
    content = json.loads(file.read_text())
    content["preprocessing"][key] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    message = refusal(adapter)
    assert "hf_histo.json: preprocessing" in message


def test_a_sidecar_older_than_an_option(adapter: Path) -> None:
    file = adapter / "hf_histo.json"
    content = json.loads(file.read_text())
    assert content["views"] == {"count": 1, "augmentation": "square", "seed": 0}
    newer = Sidecar.read(adapter)
    content["views"] = 8
    del content["preprocessing"]["fit"], content["preprocessing"]["preparation"], content["adapt_batch_norm"]
    del content["data"]["description"], content["data"]["near_copies_searched"]
    file.write_text(json.dumps(content), encoding="utf-8")
    sidecar = Sidecar.read(adapter)
    assert sidecar.preprocessing == newer.preprocessing
    assert sidecar.views == TestTimeViews(8)
    assert not sidecar.adapt_batch_norm
    assert sidecar.data == dataclasses.replace(newer.data, description=None)
    content["data"]["counts"] = {split: held["images"] for split, held in content["data"].pop("splits").items()}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert Sidecar.read(adapter).data.splits == {}


def test_a_sidecar_is_written_as_it_was_read(whole: Path, tmp_path: Path) -> None:
    Sidecar.read(whole).write(tmp_path)
    assert (tmp_path / "hf_histo.json").read_bytes() == (whole / "hf_histo.json").read_bytes()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backbone.name", ""),
        ("backbone.name", "../elsewhere"),
        ("backbone.revision", 1),
        ("backbone.fingerprint", None),
        ("backbone.configuration", []),
        ("backbone.more", 1),
        ("data.name", None),
        ("data.description", 1),
        ("data.near_copies_searched", "no"),
        ("data.more", 1),
        ("data.splits.test.images", -1),
        ("data.splits.test.images", "7"),
        ("data.splits.test.classes.tumor", 1.5),
        ("data.splits.test.more", 1),
        ("normalizer.method", "magic"),
        ("normalizer.reference", [[0, 0, 0], [1, 0, 0], [0, 1, 0]]),
        ("normalizer.reference", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]),
        ("normalizer.0", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1e7]]),
        ("normalizer.one", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_a_part_of_a_sidecar_with_an_invalid_value(adapter: Path, path: str, value: object) -> None:
    """The error names the part."""
    file = adapter / "hf_histo.json"
    content = json.loads(file.read_text())
    identity = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    content["normalizer"] = {"method": "rgb", "reference": identity, "0": identity}
    part = content
    *parents, key = path.split(".")
    for parent in parents:
        part = part[parent]
    part[key] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    assert f"hf_histo.json: {path.split('.')[0]}" in refusal(adapter)


def test_a_sidecar_of_a_thousand_brackets(adapter: Path) -> None:
    (adapter / "hf_histo.json").write_text("[" * 200_000, encoding="utf-8")
    assert "nested too deeply" in refusal(adapter)


@pytest.mark.parametrize(
    "change",
    [
        {"head": {"widths": [10**9, 10**9]}},
        {"head": {"widths": [512] * 10_000}},
        {"backbone": {"name": "../../etc", "revision": None, "fingerprint": ""}},
        {"backbone": {"name": "owner/../../x", "revision": None, "fingerprint": ""}},
        {"preprocessing": {"image_size": 10**9, "resize_size": 10**9, "interpolation": "bilinear",
                           "mean": [0, 0, 0], "std": [1, 1, 1]}},
    ],
)  # fmt: skip
def test_a_sidecar_that_asks_for_too_much(adapter: Path, change: dict[str, Any]) -> None:
    file = adapter / "hf_histo.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    assert "hf_histo.json" in refusal(adapter)
