"""The comparison table as a command: published and own results, resumption, balancing, and the recommendation."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import PIL.Image
import pytest
import yaml
from miniature import SIZE, divide_training, write_data
from recipe_mains import RECIPES, main_of

from hf_histo import stages
from hf_histo.config import Config, parse
from hf_histo.data.load import load
from hf_histo.evaluation import calibration, thresholds
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.experiments.compare import read_published
from hf_histo.inference import Classifier
from hf_histo.launch import run
from hf_histo.transforms.augmentation import TestTimeViews

RECIPE = RECIPES / "compare.py"
REPORT = sorted((RECIPE.parent / "configs" / "report").glob("*.yaml"))
ABLATION = sorted((RECIPE.parent / "configs" / "ablation").glob("*.yaml"))
ROWS = {"a_linear.yaml": "method: linear\n", "b_balanced.yaml": "method: linear\nhead_dropout: 0.5\n"}
TOLD = """
a_linear: {name: plain, reported: 0.9451, source: a paper}
b_balanced: {name: plain + balanced, balanced: true}
"""
Call = Callable[..., None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Centers 0 and 3 in train, 1 in val, and a test split whose labels are hidden."""
    folder = write_data(tmp_path_factory.mktemp("data") / "mini", {"train": 24, "val": 13, "test": 4})
    divide_training(folder)
    with h5py.File(folder / "test.h5", "r+") as file:
        for group in file.values():
            del group["label"]
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> list[Path]:
    """Two rows and their published results, as found by a glob."""
    for name, text in {**ROWS, "reported.yaml": TOLD}.items():
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / "rows" / name).write_text(text)
    return sorted((tmp_path / "rows").glob("*.yaml"))


@pytest.fixture
def call(backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the recipe's main in this process."""
    main = main_of(RECIPE.name)

    def call(rows: list[Path], output: Path, *more: str) -> None:
        quick = f"--image_size={SIZE} --resize_size={SIZE} --num_train_epochs=1 --learning_rate=0.01"
        fixed = f"--data={data} --backbone={backbone} --output_dir={output}"
        monkeypatch.setattr(
            sys, "argv", [RECIPE.name, "--rows", *map(str, rows), *fixed.split(), *quick.split(), *more]
        )
        run(main)

    return call


def adapter(output: Path, row: str, run: str) -> Path:
    return output / row / run / "adapter"


def accuracy(adapter: Path, split: str) -> float:
    measured = json.loads((adapter / "metrics.json").read_text())["splits"][split]["overall"]
    return float(measured["accuracy"]["value"])


def test_reported_beside_obtained(
    call: Call, rows: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    call(rows[:1], output, "--seeds=1")  # stopped after a part of it
    stamp = (adapter(output, "a_linear", "seed-0") / "metrics.json").stat().st_mtime_ns
    call(rows, output, "--seeds=2")
    assert (adapter(output, "a_linear", "seed-0") / "metrics.json").stat().st_mtime_ns == stamp

    written = json.loads((output / "validation.json").read_text())
    assert list(written["rows"]) == ["a_linear", "b_balanced"]
    plain = [accuracy(adapter(output, "a_linear", f"seed-{seed}"), "val") for seed in (0, 1)]
    balanced = []
    for seed in (0, 1):
        table = Predictions.read(adapter(output, "b_balanced", f"seed-{seed}") / "predictions" / "val.parquet")
        threshold = thresholds.for_share(table, 0.5).value
        assert table.predicted_classes(threshold).sum() == 6
        balanced.append(classification.compute(table, threshold=threshold)["accuracy"] or 0.0)
    for stem, expected in (("a_linear", plain), ("b_balanced", balanced)):
        assert written["rows"][stem]["results"].keys() == {"val (center 1)"}  # the labels of test are hidden
        found = written["rows"][stem]["results"]["val (center 1)"]["accuracy"]
        assert found == {"mean": statistics.fmean(expected), "deviation": statistics.stdev(expected), "n": 2}
    assert written["rows"]["a_linear"]["options"]["method"] == "linear"

    text = (output / "validation.md").read_text()
    assert text.strip() in capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if line.startswith("| plain  "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["plain", "model", "0.9451", "val (center 1)"]
    assert cells[4] == f"{statistics.fmean(plain):.3f} ± {statistics.stdev(plain):.3f}"
    assert cells[7] == "2"
    folder = adapter(output, "a_linear", "seed-0")
    parameters = json.loads((folder / "metrics.json").read_text())["parameters"]["trainable"]
    assert cells[10] == f"{parameters:,}" and int(cells[11]) >= 0
    assert written["rows"]["a_linear"]["cost"]["parameters"] == parameters
    tables = [
        Predictions.read(adapter(output, "a_linear", f"seed-{seed}") / "predictions" / "val.parquet") for seed in (0, 1)
    ]
    errors = [calibration.compute(table)["ece"] or 0.0 for table in tables]
    assert cells[8] == f"{statistics.fmean(errors):.3f} ± {statistics.stdev(errors):.3f}"
    assert cells[9] == cells[4]  # val is of one center
    assert "Reported 0.9451, on the publication's test split: a paper." in text
    (line,) = (line for line in text.splitlines() if line.startswith("| plain + balanced"))
    assert "0.9451" not in line and "val (center 1) (transductive)" in line
    assert "mini (content fingerprint" in text
    assert "On another backbone than its config names: plain; plain + balanced." in text
    assert min(PIL.Image.open(output / "validation.png").size) > 300


def test_held_out_centers_and_a_recommendation(call: Call, rows: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    rows[1].write_text(rows[0].read_text() + "test_time_views: 8\n")  # shares the training
    call(rows, output, "--seeds=1", "--protocol=leave_one_center_out", "--select=worst", "--baseline=a_linear")
    written = json.loads((output / "leave_one_center_out.json").read_text())
    by_center = [accuracy(adapter(output, "a_linear", f"center-{center}-seed-0"), "test") for center in (0, 1, 3)]
    found = written["rows"]["a_linear"]["results"]
    assert found["held-out centers, mean"]["accuracy"]["mean"] == pytest.approx(statistics.fmean(by_center))
    assert found["held-out centers, worst"]["accuracy"]["mean"] == min(by_center)
    worst = {
        stem: row["results"]["held-out centers, worst"]["accuracy"]["mean"] for stem, row in written["rows"].items()
    }
    assert written["recommended"] == max(worst, key=worst.__getitem__)
    text = (output / "leave_one_center_out.md").read_text()
    name = {"a_linear": "plain", "b_balanced": "plain + balanced"}[written["recommended"]]
    assert f"Recommended, by worst accuracy over held-out centers: {name}." in text
    assert (output / "leave_one_center_out.png").is_file()

    means = [row["results"]["held-out centers, mean"]["accuracy"]["mean"] for row in written["rows"].values()]
    gain = written["rows"]["b_balanced"]["differences"]["held-out centers, mean"]
    assert gain["value"] == pytest.approx(means[1] - means[0])
    (line,) = (line for line in text.splitlines() if line.startswith("| plain + balanced") and "centers, mean" in line)
    assert f" {gain['value']:+.3f} (" in line and "(95% interval)" in text.splitlines()[0]
    assert written["baseline"] == "a_linear" and not written["rows"]["a_linear"]["differences"]


def test_rows_that_differ_at_prediction_share_a_training(call: Call, rows: list[Path], tmp_path: Path) -> None:
    base, balanced, published = rows
    first, views, adapted = (base.with_name(f"{name}.yaml") for name in ("a_both", "c_views", "d_adapted"))
    balanced.write_text(base.read_text())
    views.write_text(base.read_text() + "test_time_views: 8\n")
    adapted.write_text(base.read_text() + "adapt_batch_norm: true\n")
    first.write_text(views.read_text() + "adapt_batch_norm: true\n")  # comes before the row that trains
    output = tmp_path / "out"

    call([first, base, balanced, views, adapted, published], output, "--seeds=1")
    assert {path.parents[1].name for path in output.glob("*/*/adapter")} == {"a_linear"}
    written = json.loads((output / "validation.json").read_text())["rows"]
    assert list(written) == ["a_both", "a_linear", "b_balanced", "c_views", "d_adapted"]
    plain = Predictions.read(adapter(output, "a_linear", "seed-0") / "predictions" / "val.parquet")
    files = {stem: output / stem / "seed-0" / "predictions" / "val.parquet" for stem in written if stem[0] != "b"}
    tables = {"a_linear": plain} | {stem: Predictions.read(file) for stem, file in files.items() if file.is_file()}
    assert len({tuple(table["logit"]) for table in tables.values()}) == 4
    for stem, table in tables.items():
        assert written[stem]["values"]["val (center 1)"]["accuracy"] == {"0": classification.compute(table)["accuracy"]}
    at_half = classification.compute(plain, threshold=thresholds.for_share(plain, 0.5).value)["accuracy"]
    assert written["b_balanced"]["values"]["val (center 1)"]["accuracy"] == {"0": at_half}

    classifier = Classifier.from_pretrained(adapter(output, "a_linear", "seed-0"))
    validation = load(written["c_views"]["options"]["data"])["val"]
    assert (
        tables["c_views"]["logit"].tolist()
        == classifier.predict(validation, test_time_views=TestTimeViews(8))["logit"].tolist()
    )
    stamp = files["c_views"].stat().st_mtime_ns
    call([views, base], output, "--seeds=1")
    assert files["c_views"].stat().st_mtime_ns == stamp
    files["c_views"].with_name("adapter.txt").write_text("the checksum of an adapter that was trained again since")
    call([views, base], output, "--seeds=1")
    assert files["c_views"].stat().st_mtime_ns > stamp


def test_robustness_and_what_is_transductive(
    call: Call, rows: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"reason": None, "pairs": [], "center": None}
    drops = [{"average_performance_drop": drop} for drop in (-0.056, -0.079)]
    before, after = (measured | {"index": at, "drop": drop} for at, drop in zip((0.397, 0.317), drops, strict=True))
    found = {"splits": ["val", "test"], "before": before, "after": after}
    call([rows[0]], tmp_path / "few", "--seeds=1", "--robustness")
    assert "withheld: expected two centers with at least 20" in (tmp_path / "few" / "validation.md").read_text()
    monkeypatch.setattr(stages, "_robustness", lambda *_: found)
    rows[0].write_text(rows[0].read_text() + "normalization: rgb\n")
    call([rows[0]], tmp_path / "out", "--seeds=1", "--protocol=leave_one_center_out", "--robustness")
    written = json.loads((tmp_path / "out" / "leave_one_center_out.json").read_text())["rows"]["a_linear"]
    assert written["robustness"]["after"]["index"] == {"mean": pytest.approx(0.317), "deviation": 0, "n": 3}
    assert written["transductive"] == ["0", "1", "3"]
    text = (tmp_path / "out" / "leave_one_center_out.md").read_text()
    assert "held-out centers, worst (transductive)" in text
    assert "robustness index, before → after training" in text
    for cell in ("0.397 ± 0.000 → 0.317 ± 0.000", "-0.056 ± 0.000 → -0.079 ± 0.000"):
        assert f" {cell} |" in text


@pytest.mark.parametrize(
    ("published", "options", "message"),
    [
        ("a_linear: {reported: 0.9}", "", "a_linear reports 0.9, expected a number from 0 to 1 and its source"),
        ("a_linear: {reported: 94.5, source: x}", "", "a_linear reports 94.5"),
        ("a_linear: {resported: 0.9}", "", "a_linear can't be read"),
        ("- a_linear", "", "can't be read"),
        ("a_linear: [", "", "reported.yaml"),
        ("b_balanced: {name: a_linear}", "", "'a_linear' is the name of two rows"),
        ("", "--config=x.yaml", "--config is one config"),
        ("", "--seeds=0", "--seeds is 0"),
        ("", "--baseline=c", "--baseline c: not among the rows, expected one of a_linear, b_balanced"),
        ("", "--select=mean", "expected --protocol leave_one_center_out"),
        ("", "--protocol=test", "--protocol"),
        ("", "--lora_rang=4", "'--lora_rank'"),
    ],
)
def test_bad_input_is_one_line(
    call: Call,
    rows: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    published: str,
    options: str,
    message: str,
) -> None:
    (tmp_path / "rows" / "reported.yaml").write_text(published)
    with pytest.raises(SystemExit) as end:
        call(rows, tmp_path / "out", *options.split())
    assert end.value.code == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (tmp_path / "out").exists()


def test_rows_validated_on_other_images_have_no_paired_difference(
    call: Call, rows: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pooled = tmp_path / "rows" / "c_pooled.yaml"
    pooled.write_text("method: linear\npool_centers: true\n")
    with pytest.raises(SystemExit):
        call([*rows, pooled], tmp_path / "out", "--baseline=a_linear")
    assert f"error: --rows {pooled}: pool_centers is True, but False in 'plain'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_must_be_configs_of_one_data_set(
    call: Call, rows: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ([rows[-1]], [tmp_path / "none.yaml"], [rows[0], rows[0]]):
        with pytest.raises(SystemExit):
            call(given, tmp_path / "out")
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "expected at least one" in errors[0]
    assert "none.yaml" in errors[1]
    assert "two rows" in errors[2]


def test_every_row_of_the_report_is_a_config_and_published() -> None:
    stems = [path.stem for path in REPORT]
    assert stems.count("reported") == 1
    assert len(stems) == 7
    published = yaml.safe_load(REPORT[stems.index("reported")].read_text())
    assert sorted([*published, "reported"]) == stems
    for path in REPORT:
        if path.stem != "reported":
            assert parse(None, ["--config", str(path)]) != Config(), path
    assert {stem: row["reported"] for stem, row in published.items() if "reported" in row} == {"5_lora": 0.9451}
    assert published["5_lora"]["source"]


def test_the_brain_mri_backbones_differ_in_nothing_else() -> None:
    folder = RECIPE.parent / "configs" / "mri_backbones"
    published = yaml.safe_load((folder / "reported.yaml").read_text())
    files = [path for path in folder.glob("*.yaml") if path.stem != "reported"]
    assert sorted(published) == sorted(["mri_vgg16_lora", *(path.stem for path in files)])
    assert published["mri_vgg16_lora"]["reported"] == 0.2919
    vgg = parse(None, ["--config", str(folder.parent / "mri_vgg16_lora.yaml")]).flat()
    for path in files:
        own = parse(None, ["--config", str(path)]).flat()
        if own["method"] == "lora":
            assert {key for key in vgg if own[key] != vgg[key]} <= {"backbone", "target_modules"}, path
        assert own["split"] == "published" and own["negative_class"] == "no_tumor", path


def test_results_published_in_the_folder_of_another_row(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "reported.yaml").write_text("base: {name: the base, reported: 0.5, source: x}")
    published = read_published([tmp_path / "base.yaml", tmp_path / "rows" / "one.yaml"])
    assert (published["base"].name, published["base"].reported, published["one"].name) == ("the base", 0.5, "one")


def test_every_row_of_the_ablation_is_declared_and_close_to_another() -> None:
    published = yaml.safe_load((RECIPE.parent / "configs" / "ablation" / "reported.yaml").read_text())
    rows = {path.stem: set(path.read_text().splitlines()[1:]) for path in ABLATION if path.stem != "reported"}
    assert sorted(published) == sorted(rows)
    assert not any("reported" in row for row in published.values())
    for stem, lines in rows.items():
        parse(None, ["--config", str(RECIPE.parent / "configs" / "ablation" / f"{stem}.yaml")])
        others = [other for name, other in rows.items() if name != stem]
        assert min(len(lines ^ other) for other in others) <= 2, stem
