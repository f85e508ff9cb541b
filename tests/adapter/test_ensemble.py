"""Ensemble folders: the saved predictions are those that the folder gives again, here, on the Hub, and as a command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from adapter_folders import logits
from recipe_mains import main_of

from hf_histo import app, hub
from hf_histo.adapter import ensemble
from hf_histo.config.commands import EnsembleOptions
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration
from hf_histo.evaluation.predictions import Predictions
from hf_histo.experiments.ensemble import make_ensemble
from hf_histo.files import checksum, read_json
from hf_histo.inference import Classifier, Ensemble
from hf_histo.result import Result


@pytest.fixture(scope="module")
def members(results: dict[str, Result]) -> list[Path]:
    return [results[name].adapter for name in ("frozen", "track")]


@pytest.fixture(scope="module")
def made(members: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "ensemble"
    ensemble.save(folder, members)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def test_it_predicts_the_mean_logits_again(made: Path, members: list[Path], source: tuple[Path, Path]) -> None:
    mean = np.mean([logits(member, "val") for member in members], axis=0)
    assert np.abs(logits(members[0], "val") - mean).max() > 1e-3
    np.testing.assert_allclose(logits(made, "val"), mean, rtol=0, atol=1e-6)
    classifier = Classifier.from_pretrained(made)
    assert isinstance(classifier, Ensemble) and len(classifier.members) == 2
    table = classifier.predict(load(source[1])["val"], threshold="validation")
    np.testing.assert_allclose(table.logits, mean, rtol=0, atol=1e-5)

    metrics, record = read_json(made / "metrics.json"), read_json(made / "ensemble.json")
    own = calibration.fit_temperature(Predictions.read(made / "predictions" / "val.parquet"))
    assert record["temperature"] == own.value == classifier.sidecar.temperature
    expected = table.with_temperature(own.value)["probability"]
    np.testing.assert_allclose(table["calibrated"], expected)
    assert classifier.sidecar.thresholds == record["thresholds"]
    assert metrics["splits"].keys() == {"val", "test"}
    parts = [read_json(member / "metrics.json")["parameters"]["trainable"] for member in members]
    assert metrics["parameters"]["trainable"] == sum(parts)
    maps = classifier.explain(load(source[1])["val"].select([0]), [1])
    assert maps[0].shape == load(source[1])["val"][0]["image"].size[::-1]


def test_the_commands(members: list[Path], source: tuple[Path, Path], tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "ensemble"
    for recipe, arguments in (
        ("ensemble", ["--adapters", *map(str, members), f"--output_dir={out}"]),
        ("predict", [f"--adapter={out}", f"--data={source[1]}", f"--output={tmp_path / 'preds.csv'}"]),
    ):
        monkeypatch.setattr(sys, "argv", [recipe, *arguments])
        main_of(f"{recipe}.py")()
    (tmp_path / "empty").mkdir()
    with pytest.raises(HistoError, match="empty exists already; choose another one"):
        make_ensemble(EnsembleOptions(adapters=[*map(str, members)], output_dir=tmp_path / "empty"))
    printed = capsys.readouterr().out
    assert str(members[1]) in printed and "| ensemble " in printed and f"ensemble folder: {out}" in printed
    probability = 1 / (1 + np.exp(-logits(out, "test")))
    np.testing.assert_allclose(pd.read_csv(tmp_path / "preds.csv")["Prob"], probability.ravel(), atol=1e-5)


def test_what_is_uploaded_is_complete_and_names_no_path(made: Path, source: tuple[Path, Path], tmp_path: Path) -> None:
    contents = hub.in_public(made, "me/mine")
    for name, content in contents.items():
        path = tmp_path / "download" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        if path.suffix in (".json", ".md"):
            assert str(source[0]) not in path.read_text(encoding="utf-8"), name
    assert "me/mine" in (tmp_path / "download" / "README.md").read_text(encoding="utf-8")
    again = Classifier.from_pretrained(tmp_path / "download", backbone=str(source[0]))
    table = again.predict(load(source[1])["val"])
    np.testing.assert_allclose(table.logits, logits(made, "val"), rtol=0, atol=1e-5)


def test_members_that_do_not_agree(members: list[Path], made: Path, tmp_path: Path) -> None:
    with pytest.raises(HistoError, match="found 1, expected 2"):
        ensemble.save(tmp_path / "new", members[:1])
    other = shutil.copytree(members[1], tmp_path / "other")
    (other / "predictions" / "val.parquet").unlink()
    with pytest.raises(HistoError, match="the backbone is the local folder"):
        app.write_space(tmp_path / "space", made)
    with pytest.raises(HistoError, match=r"other: holds no predictions/val.parquet"):
        ensemble.save(tmp_path / "new", [members[0], other])
    sidecar = read_json(other / "hf_histo.json")
    sidecar["data"]["fingerprint"] = "of other images"
    (other / "hf_histo.json").write_text(json.dumps(sidecar), encoding="utf-8")
    listed = read_json(other / "checksums.json")
    listed["files"]["hf_histo.json"] = checksum(other / "hf_histo.json")
    (other / "checksums.json").write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(HistoError, match=r"data \(fingerprint\) is of other images"):
        ensemble.save(tmp_path / "new", [members[0], other])
    assert not (tmp_path / "new").exists()
    with pytest.raises(HistoError, match="is an ensemble of several adapters, expected one"):
        hub.load(made)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("ensemble.json", {"members": ["members/0", "../other"]}, "does not match its checksum"),
        ("members/1/hf_histo.json", {"temperature": 5.0}, "unchanged"),
        ("predictions/val.parquet", None, "does not match its checksum"),
    ],
)
def test_a_changed_folder(copy: Path, file: str, change: dict[str, object] | None, message: str) -> None:
    path = copy / file
    path.write_bytes(json.dumps(read_json(path) | change).encode() if change else b"")
    with pytest.raises(HistoError, match=message):
        Classifier.from_pretrained(copy)


def test_members_outside_the_folder(copy: Path) -> None:
    record, listed = read_json(copy / "ensemble.json"), read_json(copy / "checksums.json")
    (copy / "ensemble.json").write_text(json.dumps(record | {"members": ["members/0", "../../x"]}), encoding="utf-8")
    listed["files"]["ensemble.json"] = checksum(copy / "ensemble.json")
    (copy / "checksums.json").write_text(json.dumps(listed), encoding="utf-8")
    with pytest.raises(HistoError, match=r"ensemble.json: members is invalid"):
        Classifier.from_pretrained(copy)
    shutil.rmtree(copy / "members" / "1")
    with pytest.raises(HistoError):
        Classifier.from_pretrained(copy)
