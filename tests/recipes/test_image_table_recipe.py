"""Recipes on a table of images: centers are held out and shown by name, and new tables are predicted."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from miniature import SIZE, write_image_table
from recipe_mains import main_of

from hf_histo.evaluation.predictions import Predictions
from hf_histo.files import read_json
from hf_histo.inference import Classifier

QUICK = (f"--image_size={SIZE}", f"--resize_size={SIZE}", "--num_train_epochs=1", "--per_device_train_batch_size=12")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_table(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(table: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run that holds out a center printed, and its adapter."""
    output = tmp_path_factory.mktemp("run") / "out"
    options = [f"--data={table}", f"--backbone={backbone}", *QUICK]
    options += ["--split_column=none", "--test_centers=Leipzig", "--normalization=rgb", f"--output_dir={output}"]
    main = main_of("histo_lora.py")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.setattr(sys, "argv", ["histo_lora.py", *options])
        patch.setattr("hf_histo.evaluation.figures.run.draw", lambda *arguments, **options: {})
        main()
    return shown.getvalue(), output / "adapter"


def test_centers_have_their_names_everywhere(run: tuple[str, Path], table: Path) -> None:
    shown, adapter = run
    assert "| test (Leipzig)" in shown and "| val (Halle, Jena)" in shown
    splits = read_json(adapter / "metrics.json")["splits"]
    assert {split: list(measured["centers"]) for split, measured in splits.items()} == {
        "val": ["Halle", "Jena"],
        "test": ["Leipzig"],
    }
    for name in ("report.html", "README.md"):
        text = (adapter / name).read_text(encoding="utf-8")
        assert "center Leipzig" in text and "Halle" in text and str(table.parent) not in text
    assert "centers that are not in train: Leipzig" in (adapter / "README.md").read_text(encoding="utf-8")
    assert read_json(adapter / "hf_histo.json")["center_names"] == ["Halle", "Jena", "Leipzig"]
    predictions = Predictions.read(adapter / "predictions" / "test.parquet")
    assert list(predictions.known_centers) == ["Leipzig"] and len(predictions) == 24


def test_new_centers_are_matched_by_name(run: tuple[str, Path], table: Path, tmp_path: Path) -> None:
    """Color statistics of a known name are used again, whatever its number; an unknown name is measured."""
    classifier = Classifier.from_pretrained(run[1])
    image = table.parent / "images" / "2.png"  # of Halle
    by_name, by_other, by_number = (classifier([image], center=center) for center in ("Halle", "Ulm", 0))
    assert by_name.transductive == [] and list(by_name.known_centers) == ["Halle"]
    assert by_other.transductive == by_number.transductive == ["color statistics"]
    predicted = tmp_path / "new.csv"
    rows = pd.read_csv(table)
    rows.loc[rows["center"] == "Halle", ["image", "center"]].to_csv(predicted, index=False)
    from hf_histo import load_dataset

    found = classifier(load_dataset(predicted, image_root=table.parent)["test"])
    assert found.transductive == [] and found["id"].iloc[0] == "images/2.png"
    assert found["logit"].iloc[0] == pytest.approx(by_name["logit"].iloc[0], abs=1e-4)


def test_a_table_without_labels_is_predicted(
    run: tuple[str, Path], table: Path, tmp_path: Path, shown_by: Callable[..., str]
) -> None:
    pd.read_csv(table)[["picture"]].to_csv(tmp_path / "new.csv", index=False)
    places = (f"--adapter={run[1]}", f"--data={tmp_path / 'new.csv'}", f"--output={tmp_path / 'out.csv'}")
    named = (f"--image_root={table.parent}", "--image_column=picture")
    assert "72 predictions" in shown_by("predict.py", *places, *named)
    assert pd.read_csv(tmp_path / "out.csv")["ID"][0] == "images/71.png"


def test_each_named_center_is_held_out(
    table: Path, backbone: Path, tmp_path: Path, shown_by: Callable[..., str]
) -> None:
    fixed = (f"--data={table}", f"--backbone={backbone}", f"--output_dir={tmp_path / 'out'}", "--method=linear")
    shown = shown_by(
        "leave_one_center_out.py", *fixed, *QUICK, "--seeds=1", "--split_column=none", "--augmentation=none"
    )
    assert all(f"| center {name}" in shown for name in ("Halle", "Jena", "Leipzig"))
    written = json.loads((tmp_path / "out" / "leave_one_center_out.json").read_text())
    assert list(written["metrics"]["auroc"]["centers"]) == ["Halle", "Jena", "Leipzig"]


def test_an_audit_names_the_centers(table: Path, tmp_path: Path, shown_by: Callable[..., str]) -> None:
    shown = shown_by("audit.py", f"--data={table}", f"--output_dir={tmp_path / 'audit'}")
    assert "center Leipzig: normal" in shown
    assert (tmp_path / "audit" / "samples_test_center_Leipzig.png").is_file()
    strata = read_json(tmp_path / "audit" / "audit.json")["splits"][0]["centers"]
    assert {stratum["center"] for stratum in strata} == {"Halle", "Jena", "Leipzig"}
