"""`hf_histo.fine_tune`: keyword options, data in memory, and the result that a notebook shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from miniature import SIZE, write_centers, write_image_table

import hf_histo
from hf_histo import api
from hf_histo.config import AdapterOptions, Config, parse, parse_fine_tuning, parse_options
from hf_histo.data.load import fingerprint
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.result import Result

QUICK: dict[str, Any] = {
    "image_size": SIZE,
    "resize_size": SIZE,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "target_modules": "last-conv",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_centers(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def result(source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Result:
    backbone, data = source
    folder = tmp_path_factory.mktemp("result") / "run"
    return hf_histo.fine_tune(data, backbone=backbone, output_dir=folder, normalization="rgb", **QUICK)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, datasets.DatasetDict]]:
    """The runs that `fine_tune` starts, which don't train."""
    runs: list[tuple[Config, datasets.DatasetDict]] = []

    def run_config(config: Config, data: datasets.DatasetDict, **_: object) -> None:
        runs.append((config, data))

    monkeypatch.setattr(api, "run_config", run_config)
    return runs


def test_keywords_are_the_options_of_the_command_line() -> None:
    given = parse_options(
        {"backbone": Path("x"), "lora_rank": 4, "learning_rate": 1e-5, "gray": True, "max_steps": None}
    )
    assert given == parse_fine_tuning(None, ["--backbone=x", "--lora_rank=4", "--learning_rate=1e-5", "--gray"])


def test_keywords_win_over_a_config(tmp_path: Path) -> None:
    packaged = parse(None, ["--config=histo_ood", "--seed=3"])
    assert parse_options({"seed": 3}, "histo_ood") == packaged
    (tmp_path / "mine.yaml").write_text("lora_rank: 2\nseed: 5\n", encoding="utf-8")
    assert parse_options({"seed": 3}, tmp_path / "mine.yaml") == parse(None, ["--lora_rank=2", "--seed=3"])
    assert parse_options({"seed": 3}, Config(adapter=AdapterOptions(lora_rank=2))).adapter.lora_rank == 2


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"lora_rnk": 4}, None, "unknown option 'lora_rnk'; did you mean 'lora_rank'?"),
        ({"lora_rank": 0}, None, "--lora_rank is 0, expected more than 0"),
        ({"lora_rank": 2.5}, None, "argument --lora_rank/--lora-rank: invalid int value: '2.5'"),
        ({"lora_rank": [4]}, None, "lora_rank takes one value, found a list of 1; give text or a number"),
        ({"backbone": object()}, None, "backbone takes one value, found a object"),
        ({"resume_from_checkpoint": True}, None, "resume_from_checkpoint is True, expected text or a number"),
        ({"method": "lorra"}, None, "argument --method: invalid choice: 'lorra'"),
        ({"method": "linear", "lora_rank": 4}, None, "--lora_rank is 4, which acts only with --method lora"),
        ({}, "histo_odd", "did you mean 'histo_ood'?"),
        ({"domain_weight": 2.0}, Config(), "--domain_weight is 2.0, which acts only with --domain_loss"),
        ({"text_prompt": None}, "cytology_text", "text_prompt is None, and config has"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    options: dict[str, Any], config: str | Config | None, message: str
) -> None:
    with pytest.raises(HistoError) as refused:
        hf_histo.fine_tune("synthetic", config=config, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_metrics_are_a_table_of_splits_and_centers(result: Result) -> None:
    table = result.metrics
    assert list(table[table["split"] == "test"]["center"]) == ["overall", "2"]
    assert list(table.columns[:6]) == ["split", "center", "images", "groups", "transductive", "accuracy"]
    overall = result.record["splits"]["val"]["overall"]
    row = table[(table["split"] == "val") & (table["center"] == "overall")].iloc[0]
    assert row["images"] == overall["n"] == 13
    for bound in ("low", "high"):
        assert row[f"accuracy_{bound}"] == overall["accuracy"][bound]
    assert table["transductive"].all()  # the color of val and test was measured on their images
    assert "average_precision" in table and {kind.kind for kind in table.dtypes[5:]} == {"f"}


def test_a_result_holds_predictions_and_the_classifier(result: Result, source: tuple[Path, Path]) -> None:
    assert set(result.predictions) == {"val", "test"}
    assert isinstance(result.predictions["test"], Predictions)
    rows = hf_histo.load_dataset(source[1])["test"]
    pd.testing.assert_series_equal(
        result.classifier.predict(rows)["logit"], result.predictions["test"]["logit"], atol=1e-5
    )
    assert result.classifier is result.classifier
    assert "adapter folder: " in result.summary()


def test_how_a_result_is_shown(result: Result) -> None:
    assert repr(result).startswith(f"Result('{result.folder}': val accuracy 0.")
    page = result._repr_html_()
    assert f"hf_histo predict --adapter {result.adapter}" in page
    assert "data:image/png;base64," in page
    assert "test (transductive)" in page and "Transductive: used the unlabeled images of test" in page
    assert len(page) < 300_000


def test_names_from_data_are_escaped(result: Result, tmp_path: Path) -> None:
    report = result.record["splits"]["test"]
    hostile = "<script>alert(1)</script>"
    changed = dict(report, centers={hostile: report["overall"], "b": report["overall"]})
    shown = Result(tmp_path / hostile, {"splits": {hostile: changed}}, 1.0)._repr_html_()
    assert hostile not in shown and "&lt;script&gt;" in shown


def test_the_same_call_returns_the_finished_run(result: Result, source: tuple[Path, Path]) -> None:
    options = {"backbone": source[0], "output_dir": result.folder, "normalization": "rgb"} | QUICK
    again = hf_histo.fine_tune(source[1], **options)
    assert again.seconds is None and again.record == result.record
    with pytest.raises(HistoError, match="holds another run: max_steps 2 "):
        hf_histo.fine_tune(source[1], **options | {"max_steps": 3})


def test_the_precision_of_a_run_is_its_own(
    source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    found = {}
    for name, options in {"bf16": {"mixed_precision": "bf16"}, "auto": {}}.items():
        run = hf_histo.fine_tune(source[1], backbone=source[0], output_dir=tmp_path / name, **QUICK | options)
        found[name] = (run.folder / "cost.json").read_text(encoding="utf-8")
    assert '"precision": "bf16"' in found["bf16"] and '"precision": "no"' in found["auto"]


def test_data_in_memory(tmp_path: Path, prepared: list[Any]) -> None:
    file = write_image_table(tmp_path)
    frame = pd.read_csv(file)
    by_name = frame[["image", "label"]]
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "image_root": file.parent}
    hf_histo.fine_tune(file, cache_dir=tmp_path / "cache", test_centers="Jena")
    hf_histo.fine_tune(frame, **options, test_centers="Jena")
    hf_histo.fine_tune(list(by_name["image"]), list(by_name["label"]), **options)
    from_file, from_frame, from_lists = prepared
    assert from_file[0].data.data == str(file)
    for split, rows in from_file[1].items():
        assert rows[:]["id"] == from_frame[1][split][:]["id"]
    assert set(from_frame[1]["test"]["center"]) == {1}
    assert re.fullmatch(r"memory-[0-9a-f]{8}", from_frame[0].data.data)
    assert {split: len(rows) for split, rows in from_lists[1].items()} == {"train": 48, "val": 12, "test": 12}
    with pytest.raises(HistoError, match=r"no column 'labell' .*did you mean 'label'"):
        hf_histo.fine_tune(frame, **options, label_column="labell")
    with pytest.raises(HistoError, match="data is a int, expected a path, a table or a list of paths"):
        hf_histo.fine_tune(3)  # type: ignore[arg-type]


def test_a_prepared_data_set(source: tuple[Path, Path], prepared: list[Any]) -> None:
    data = hf_histo.load_dataset(source[1])
    fewer = datasets.DatasetDict(data, train=data["train"].select(range(12)))
    for each in (data, fewer, fewer):
        hf_histo.fine_tune(each, backbone=source[0])
    prints = [fingerprint(found) for _, found in prepared]
    assert prints[0] != prints[1] == prints[2]  # a run on fewer images is another run
    assert len(prepared[1][1]["train"]) == 12
    assert fingerprint(data) not in prints  # what was passed is unchanged
    with pytest.raises(HistoError, match="--gray_bits is 12, which changes nothing for data that is loaded already"):
        hf_histo.fine_tune(data, gray_bits=12)
    hf_histo.fine_tune(data, pool_centers=True)
    assert len(prepared[-1][1]["train"]) > len(data["train"])


def test_splits_of_the_datasets_library(tmp_path: Path, prepared: list[Any]) -> None:
    frame = pd.read_csv(write_image_table(tmp_path))
    frame["image"] = [str(tmp_path / "table" / name) for name in frame["image"]]
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["normal", "tumor"]))
    splits = {
        name: datasets.Dataset.from_pandas(rows[["image", "label"]], preserve_index=False).cast(kinds)
        for name, rows in {"train": frame[:40], "validation": frame[40:56], "test": frame[56:]}.items()
    }
    hf_histo.fine_tune(datasets.DatasetDict(splits), image_root=tmp_path, cache_dir=tmp_path / "cache")
    found = prepared[0][1]
    assert {name: len(rows) for name, rows in found.items()} == {"train": 40, "val": 16, "test": 16}
    assert found["val"].features["label"].names == ["normal", "tumor"]
