"""Adapters of bags: what they predict after training, and where single images are needed they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from miniature import SIZE, write_adapter, write_backbone, write_bags

from hf_histo import app, export
from hf_histo.adapter import ensemble
from hf_histo.config.commands import AcceptOptions, AppOptions, PredictOptions
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.forward import forward
from hf_histo.experiments import accept, predict
from hf_histo.inference import Classifier
from hf_histo.models import heads
from hf_histo.transforms.pipeline import Pipeline


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Adapters of "abmil", "mean" and "max", by name in a folder, and a table of bags."""
    folder = tmp_path_factory.mktemp("source")
    backbone = write_backbone(folder / "backbone")
    for name in ("abmil", "mean", "max"):
        write_adapter(folder / "adapters" / name, backbone, head=heads.HeadConfig(aggregation=name, attention_width=16))
    return folder / "adapters", write_bags(folder / "bags", groups=8)


@pytest.mark.parametrize("aggregation", ["abmil", "mean", "max"])
def test_a_prediction_is_the_aggregate_of_a_group(source: tuple[Path, Path], aggregation: str) -> None:
    classifier = Classifier.from_pretrained(source[0] / aggregation)
    rows = load(source[1])["train"]
    table = classifier(rows)
    assert table["id"].tolist() == ["G0", "G1", "G2", "G3"]
    assert table["label"].tolist() == [0, 1, 0, 1]
    # By the features of the images, one by one.
    pipeline = Pipeline(classifier.sidecar.preprocessing)
    features = torch.from_numpy(forward(heads.Features(classifier.model), rows, pipeline, batch_size=1)).float()
    head = heads.bag_head(classifier.model)
    with torch.no_grad():
        alone = head(features)[:, 0].numpy().reshape(4, 6)
        scores = head.get_submodule("attention")(features) if aggregation == "abmil" else torch.zeros(24)
        weights = scores.reshape(4, 6).softmax(1).numpy()
    # The classifier is linear: the logit of a mean is the mean of the logits.
    expected = alone.max(1) if aggregation == "max" else (weights * alone).sum(1)
    np.testing.assert_allclose(table.logits, expected, rtol=1e-4, atol=1e-4)
    assert len(set(np.round(table.logits, 3))) == 4

    bags, patches = classifier.predict_bags(rows)
    pd.testing.assert_frame_equal(bags, table)
    np.testing.assert_allclose(patches.probabilities[:, 1], 1 / (1 + np.exp(-alone.ravel())), rtol=1e-4)
    if aggregation == "abmil":
        assert patches.attention is not None
        np.testing.assert_allclose(patches.attention, weights.ravel(), rtol=1e-3, atol=1e-6)
    else:
        assert patches.attention is None


def test_a_csv_has_a_row_for_each_group(source: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, data = source
    text = predict.predict(
        PredictOptions(adapter=str(adapter / "abmil"), data=str(data), output=tmp_path / "p.csv", split="train")
    )
    assert text.startswith("4 predictions")
    assert pd.read_csv(tmp_path / "p.csv")["ID"].tolist() == ["G0", "G1", "G2", "G3"]


def test_images_of_no_group_are_refused(source: tuple[Path, Path]) -> None:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    with pytest.raises(HistoError, match="--aggregation: 1 of 1 images are of no group"):
        Classifier.from_pretrained(source[0] / "abmil")(image)


def exported(adapter: str, data: str, output: Path) -> None:
    classifier = Classifier.from_pretrained(adapter)
    export.export(classifier.model, classifier.sidecar, output, "onnx")


def averaged(adapter: str, data: str, output: Path) -> None:
    classifier = Classifier.from_pretrained(adapter)
    classifier.load_adapter(adapter, "other")
    classifier.average(["default", "other"])


def explained(adapter: str, data: str, output: Path) -> None:
    options = PredictOptions(adapter=adapter, data=data, output=output / "p.csv", explain=output / "e.png")
    predict.predict(options)


WITH_IMAGES: dict[str, Callable[[str, str, Path], object]] = {
    "export": exported,
    "mean": averaged,
    "explain": explained,
    "app": lambda adapter, data, output: app.run(AppOptions(adapter=adapter)),
    "space": lambda adapter, data, output: app.run(AppOptions(adapter=adapter, space_dir=output)),
    "accept": lambda adapter, data, output: accept.accept(AcceptOptions(adapter=adapter, data=data, output_dir=output)),
    "ensemble": lambda adapter, data, output: ensemble.save(output, [Path(adapter)] * 2),
}


@pytest.mark.parametrize("what", WITH_IMAGES)
def test_what_needs_single_images_is_refused(source: tuple[Path, Path], tmp_path: Path, what: str) -> None:
    with pytest.raises(HistoError, match=r"predicts slides or groups as a whole .--aggregation abmil.*single images"):
        WITH_IMAGES[what](str(source[0] / "abmil"), str(source[1]), tmp_path / "output")
