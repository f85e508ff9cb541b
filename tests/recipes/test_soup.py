"""Greedy soups as a command: the mean of the kept adapters, chosen on val, is what is saved."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from miniature import config, write_data
from recipe_mains import main_of

from hf_histo.config.commands import SoupOptions
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.experiments.soup import make_soup
from hf_histo.files import read_json
from hf_histo.finetune import run_config
from hf_histo.inference import Classifier


def test_the_mean_of_those_that_help(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    runs = []
    for place, rate in enumerate((0.01, 0.012, 0.5)):  # the last one is no good
        options = ["--target_modules=last-conv", "--metric_for_best_model=accuracy", f"--learning_rate={rate}"]
        made = config(tmp_path / f"run{place}", backbone, data, *options)
        runs.append(run_config(made, load(data)).adapter)
    capsys.readouterr()
    soup = tmp_path / "soup"
    monkeypatch.setattr(sys, "argv", ["soup", "--adapters", *map(str, runs), f"--data={data}", f"--output_dir={soup}"])
    main_of("soup.py")()
    printed = capsys.readouterr().out
    metrics = read_json(soup / "metrics.json")
    kept = [row["adapter"] for row in metrics["soup"] if row["kept"]]
    assert 1 < len(kept) < 3
    own = {row["adapter"]: row["own"] for row in metrics["soup"]}
    assert sorted(own.values(), reverse=True) == list(own.values())
    assert all(row["kept"] or f"left out: {row['adapter']}" in printed for row in metrics["soup"])

    # The greedy choice, by hand.
    by_name = {f"{run.parent.name}/adapter": run for run in runs}
    rows = load(data)["val"]
    expected, best = [next(iter(own))], next(iter(own.values()))
    for name in [*own][1:]:
        classifier = Classifier.from_pretrained(by_name[expected[0]])
        for other in [*expected[1:], name]:
            classifier.load_adapter(by_name[other], other.split("/")[0])
        classifier.average(["default", *(other.split("/")[0] for other in [*expected[1:], name])])
        accuracy = classification.compute(classifier.predict(rows))["accuracy"]
        assert accuracy is not None
        if accuracy >= best:
            expected, best = [*expected, name], accuracy
    assert kept == expected
    assert metrics["selection"]["value"] == pytest.approx(best, abs=1e-6)

    again = Classifier.from_pretrained(soup).predict(rows)
    saved = Predictions.read(soup / "predictions" / "val.parquet")
    np.testing.assert_allclose(again.logits, saved.logits, rtol=0, atol=1e-5)
    assert classification.compute(again)["accuracy"] == pytest.approx(best, abs=1e-5)
    card = (soup / "README.md").read_text(encoding="utf-8")
    assert f"the mean of {len(kept)} of 3 adapters" in card

    other = write_data(tmp_path / "other", {"train": 8, "val": 5, "test": 4})
    with pytest.raises(HistoError, match="its val differs in"):
        make_soup(SoupOptions(adapters=[*map(str, runs)], data=str(other), output_dir=tmp_path / "new"))
    relabeled = shutil.copytree(data, tmp_path / "relabeled")
    with h5py.File(relabeled / "val.h5", "r+") as file:
        first = next(iter(file.values()))
        first["label"][...] = 1 - first["label"][()]
    with pytest.raises(HistoError, match="its val differs in 1 images, or their labels, from that of"):
        make_soup(SoupOptions(adapters=[*map(str, runs)], data=str(relabeled), output_dir=tmp_path / "new"))
    with pytest.raises(HistoError, match="found 1, expected two or more"):
        make_soup(SoupOptions(adapters=[str(runs[0])], data=str(data), output_dir=tmp_path / "new"))
