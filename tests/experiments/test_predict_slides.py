"""Prediction of whole slides: equal to that of their patches, resumed, shared, and with bad slides among them."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import slide_files
import tifffile
from miniature import OF_SLIDES, SIZE, write_adapter, write_backbone

from hf_histo.cli import main
from hf_histo.config import parse_command
from hf_histo.config.commands import PredictSlidesOptions
from hf_histo.data.readers import slides
from hf_histo.data.schema import center_names
from hf_histo.data.synthetic.slides import write_tiff
from hf_histo.errors import HistoError
from hf_histo.evaluation import slide_maps
from hf_histo.evaluation.figures.slide_heat_map import slide_heat_map
from hf_histo.experiments import predict_slides as command
from hf_histo.experiments.predict_slides import predict_slides
from hf_histo.files import read_json
from hf_histo.inference import Classifier
from hf_histo.models import heads

TILE = OF_SLIDES["patch_size"]


def image(seed: int = 0) -> np.ndarray:
    """A slide whose tissue is darker to the right, so that its tiles differ."""
    pixels = slide_files.pixels(seed=seed)
    pixels[64:-64, 64:-64] = pixels[64:-64, 64:-64] * np.linspace(1, 0.2, pixels.shape[1] - 128)[:, None]
    return pixels


@dataclass(frozen=True)
class Inputs:
    """Slides of 512 x 640 pixels at 0.5 micrometers, whose tissue is 8 x 6 tiles of 64 pixels; and an adapter."""

    folder: Path
    adapter: Path

    def options(self, output: Path, *more: object, slides: str = "a.tif b.tif") -> PredictSlidesOptions:
        paths = [str(self.folder / name) for name in slides.split()]
        arguments = [*paths, "--adapter", self.adapter, "--output_dir", output, "--num_workers", 0, *more]
        return parse_command(PredictSlidesOptions, None, [str(each) for each in arguments], first="slides")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("slides")
    write_tiff(folder / "a.tif", image())
    write_tiff(folder / "b.tif", image(seed=1))
    pixels = np.random.default_rng(0).normal([232, 226, 235], 3, (512, 512, 3)).astype(np.uint8)
    write_tiff(folder / "glass.tif", pixels)
    tifffile.imwrite(folder / "bare.tif", slide_files.pixels(), tile=(256, 256), photometric="rgb", compression="zlib")
    whole = (folder / "a.tif").read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    data = bytearray(whole)
    with tifffile.TiffFile(folder / "a.tif") as file:
        start = file.pages[0].dataoffsets[1]
    data[start : start + 1000] = bytes(1000)
    (folder / "torn.tif").write_bytes(data)
    backbone = write_backbone(folder / "backbone")
    adapter = write_adapter(folder / "adapter", backbone, changes=OF_SLIDES)
    return Inputs(folder, adapter)


@pytest.fixture(autouse=True)
def _without_heat_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of miniature slides; `predicted`, which is made before, has them."""
    monkeypatch.setattr(command, "slide_heat_map", lambda *arguments, **options: None)


@pytest.fixture(scope="module")
def predicted(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of two slides."""
    output = tmp_path_factory.mktemp("predicted") / "out"
    assert predict_slides(inputs.options(output)) == f"2 slides, 96 tiles: {output / 'slides.csv'}"
    return output


def probabilities(table: pd.DataFrame) -> np.ndarray:
    return table[[name for name in table if name.startswith("probability_")]].to_numpy()


def test_tiles_are_predicted_as_their_patches_in_files(inputs: Inputs, predicted: Path, tmp_path: Path) -> None:
    table = pd.read_csv(predicted / "a" / "tiles.csv")
    names = ["slide", "x", "y", "size", "predicted", "probability_normal", "probability_tumor"]
    assert list(table) == names
    assert set(table["slide"]) == {"a"}
    assert set(table["size"]) == {TILE}
    pixels, files = image(), []
    for x, y in zip(table["x"], table["y"], strict=True):
        files.append(tmp_path / f"{x}_{y}.png")
        PIL.Image.fromarray(pixels[y : y + TILE, x : x + TILE]).save(files[-1])
    expected = Classifier.from_pretrained(inputs.adapter)(files)
    assert np.ptp(expected["probability"]) > 0.01
    np.testing.assert_allclose(table["probability_tumor"], expected["probability"], rtol=0, atol=1e-4)
    assert list(table["predicted"]) == list(expected["predicted"])


def test_scores_of_slides(predicted: Path) -> None:
    scores = pd.read_csv(predicted / "slides.csv").set_index("slide")
    assert list(scores.index) == ["a", "b"]
    for name, row in scores.iterrows():
        table = pd.read_csv(predicted / str(name) / "tiles.csv")
        tumor = table["probability_tumor"]
        assert row["tiles"] == len(table) == 48
        assert row["mean_tumor"] == pytest.approx(tumor.mean())
        assert row["top10_tumor"] == pytest.approx(tumor.nlargest(10).mean())
        assert row["area_mm2_tumor"] == pytest.approx((tumor >= 0.5).sum() * (TILE * 0.5e-3) ** 2)
        assert row["area_mm2_tumor"] + row["area_mm2_normal"] == pytest.approx(48 * 0.032**2)
        assert row["seconds"] > 0


def test_another_slide_resolution_and_worker_processes(inputs: Inputs, tmp_path: Path) -> None:
    """A slide of twice the resolution has the same tiles, at twice the coordinates."""
    large = image().repeat(2, axis=0).repeat(2, axis=1)
    write_tiff(tmp_path / "large.tif", large, mpp=0.25)
    options = inputs.options(tmp_path / "out", "--num_workers", 1, slides=f"a.tif {tmp_path / 'large.tif'}")
    predict_slides(options)
    small, other = (pd.read_csv(tmp_path / "out" / name / "tiles.csv") for name in ("a", "large"))
    assert (other[["x", "y", "size"]] == 2 * small[["x", "y", "size"]]).all(axis=None)
    np.testing.assert_allclose(probabilities(other), probabilities(small), rtol=0, atol=1e-4)


def test_bad_slides_are_reported_at_the_end(inputs: Inputs, tmp_path: Path) -> None:
    every = "bare.tif cut.tif glass.tif none.tif a.tif torn.tif"
    with pytest.raises(HistoError, match=r"5 of 6 slides failed: .*bare.tif: states no micrometers.*cut.tif.*glass"):
        predict_slides(inputs.options(tmp_path / "out", "--num_workers", 1, slides=every))
    table = pd.read_csv(tmp_path / "out" / "slides.csv").set_index("slide")
    assert list(table.index) == [name.removesuffix(".tif") for name in every.split()]
    assert table["error"].isna().tolist() == [False] * 4 + [True, False]
    for name, reason in {
        "bare": "--assume_mpp",
        "glass": "no tile with tissue",
        "none": "no such file",
        "torn": "unreadable at x=",
    }.items():
        assert reason in table["error"][name], name
        assert "Traceback" not in table["error"][name]
        assert not (tmp_path / "out" / name).exists()
    assert table["tiles"]["a"] == 48
    predict_slides(inputs.options(tmp_path / "out2", "--assume_mpp", 0.5, slides="bare.tif"))
    assert len(pd.read_csv(tmp_path / "out2" / "bare" / "tiles.csv")) == 48


def test_the_same_command_predicts_only_what_is_missing(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(self: Classifier, dataset: Any, **options: Any) -> Any:
        asked.append(dataset["group"][0])
        return predict(self, dataset, **options)

    predict = Classifier.predict
    monkeypatch.setattr(Classifier, "predict", counted)
    output, both = tmp_path / "out", " ".join(str(tmp_path / name) for name in ("a.tif", "b.tif"))
    for path in map(Path, both.split()):
        shutil.copy(inputs.folder / path.name, path)
    predict_slides(inputs.options(output, slides=str(tmp_path / "a.tif")))
    predict_slides(inputs.options(output, slides=both))
    assert asked == ["a", "b"]
    with pytest.raises(HistoError, match=r"out/a: predicted with another top_k, .*--overwrite"):
        predict_slides(inputs.options(output, "--top_k", 3, slides=both))
    predict_slides(inputs.options(output, "--top_k", 3, "--overwrite", slides=both))
    assert asked == ["a", "b", "a", "b"]
    assert "top3_tumor" in pd.read_csv(output / "slides.csv")
    predict_slides(inputs.options(output, "--top_k", 3, "--overwrite", slides=both))
    assert asked == ["a", "b", "a", "b"]
    os.utime(tmp_path / "b.tif")  # replaced
    predict_slides(inputs.options(output, "--top_k", 3, "--overwrite", slides=both))
    assert asked == ["a", "b", "a", "b", "b"]
    (output / "own").mkdir()
    write_tiff(tmp_path / "own.tif", slide_files.pixels())
    with pytest.raises(HistoError, match=r"out/own: exists without a record.json"):
        predict_slides(inputs.options(output, "--overwrite", slides=str(tmp_path / "own.tif")))


def test_a_slide_that_another_process_predicts_is_waited_for(
    inputs: Inputs, predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, waited = tmp_path / "out", []
    with ExitStack() as other:
        assert other.enter_context(command.locked(output / ".a.lock"))

        def finish(seconds: float) -> None:
            """What the other process does meanwhile."""
            waited.append(seconds)
            assert (output / "b").is_dir()
            shutil.copytree(predicted / "a", output / "a")
            other.close()

        monkeypatch.setattr("time.sleep", finish)
        assert predict_slides(inputs.options(output)).startswith("2 slides, 96 tiles")
    assert len(waited) == 1
    assert (output / "a" / "heat_map.png").is_file()  # the other one's


def test_what_another_process_failed_on_is_not_tried_again(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / ".glass.error").write_text("glass.tif: a fault", encoding="utf-8")
    future = (tmp_path / ".glass.error").stat().st_mtime + 1000
    os.utime(tmp_path / ".glass.error", (future, future))
    with pytest.raises(HistoError, match=r"1 of 1 slides failed: glass.tif: a fault"):
        predict_slides(inputs.options(tmp_path, slides="glass.tif"))
    os.utime(tmp_path / ".glass.error", (1, 1))  # of an earlier launch
    with pytest.raises(HistoError, match="no tile with tissue"):
        predict_slides(inputs.options(tmp_path, slides="glass.tif"))


def test_overlapping_tiles_and_chunks(
    inputs: Inputs, predicted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CHUNK", 100)
    threshold = pd.read_csv(predicted / "a" / "tiles.csv")["probability_tumor"].median()
    more = ["--stride", 32, "--geojson", "regions", "--threshold", threshold]
    predict_slides(inputs.options(tmp_path / "out", *more, slides="a.tif"))
    table = pd.read_csv(tmp_path / "out" / "a" / "tiles.csv")
    assert len(table) > 150
    covered = np.zeros((16, 20))  # of 32 pixels
    sums = np.zeros_like(covered)
    for x, y, value in zip(table["x"] // 32, table["y"] // 32, table["probability_tumor"], strict=True):
        covered[y : y + 2, x : x + 2] += 1
        sums[y : y + 2, x : x + 2] += value
    area = (sums[covered > 0] / covered[covered > 0] >= threshold).sum() * 0.016**2
    scores = pd.read_csv(tmp_path / "out" / "slides.csv").iloc[0]
    assert 0 < area < (covered > 0).sum() * 0.016**2
    assert scores["area_mm2_tumor"] == pytest.approx(area)
    regions = read_json(tmp_path / "out" / "a" / "regions.geojson")["features"]
    tumor = [each["properties"]["measurements"]["area mm^2"] for each in regions if of_class(each) == "tumor"]
    assert sum(tumor) == pytest.approx(area)


def of_class(feature: dict[str, Any]) -> str:
    return feature["properties"]["classification"]["name"]


def test_qupath_opens_the_tiles(inputs: Inputs, predicted: Path) -> None:
    """The reader of QuPath's annotations finds the predicted classes where they are."""
    from hf_histo.data.readers import geojson

    table = pd.read_csv(predicted / "a" / "tiles.csv")
    path = predicted / "a" / "tiles.geojson"
    features = read_json(path)["features"]
    assert [of_class(each) for each in features] == list(table["predicted"])
    assert {each["properties"]["objectType"] for each in features} == {"tile"}
    found = features[0]["properties"]["measurements"]["probability tumor"]
    assert found == pytest.approx(table["probability_tumor"][0])
    regions = geojson.read(path, slides.open_slide(inputs.folder / "a.tif"))
    shares = geojson.covered(regions, table[["x", "y"]].to_numpy(), TILE)
    assert [list(regions)[place] for place in shares.argmax(axis=1)] == list(table["predicted"])
    assert shares.max(axis=1) == pytest.approx(1)


def test_the_heat_map_has_the_shape_of_the_slide(predicted: Path) -> None:
    with PIL.Image.open(predicted / "a" / "heat_map.png") as drawn:
        assert drawn.width > drawn.height > 500
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 1000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stride", 48], "--stride is 48, expected a divisor of the patch size 64"),
        (["--stride", 128], "--stride is 128, expected a divisor"),
        (["--mpp", 1], "--mpp is 1.0, expected 0.5 as in training; leave it out"),
        (["--threshold", "best"], "--threshold is 'best', expected a probability, or a name"),
        (["--top_k", 0], "--top_k is 0, expected at least 1"),
    ],
)
def test_bad_options(inputs: Inputs, tmp_path: Path, more: list[object], message: str) -> None:
    with pytest.raises(HistoError, match=message):
        predict_slides(inputs.options(tmp_path / "out", *more))


def test_an_adapter_that_was_not_trained_on_slides_needs_their_resolution(inputs: Inputs, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", inputs.folder / "backbone", outputs=3)
    options = ["--adapter", adapter]
    with pytest.raises(HistoError, match=r"states no mpp, since it was not trained on slides; .*--mpp"):
        predict_slides(inputs.options(tmp_path / "out", *options, slides="a.tif"))
    options += ["--mpp", 1, "--patch_size", SIZE, "--geojson", "regions"]
    predict_slides(inputs.options(tmp_path / "out", *options, slides="a.tif"))
    table = pd.read_csv(tmp_path / "out" / "a" / "tiles.csv")
    np.testing.assert_allclose(probabilities(table).sum(axis=1), 1)
    assert probabilities(table).shape == (48, 3)
    grid = slides.Grid(table[["x", "y"]].to_numpy(), 64.0, 64.0, SIZE, 0.5)
    found = slide_maps.slide_map(grid, probabilities(table), 0.5)
    slide_heat_map(found, slide_files.pixels(), 1.0, ["normal", "tumor", "other"], tmp_path / "map.png", title="a")
    with PIL.Image.open(tmp_path / "map.png") as drawn:
        assert drawn.width > drawn.height > 500


def test_a_table_names_slides(inputs: Inputs, tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    table.write_text("wsi,hospital\na.tif,Leipzig\nglass.tif,Halle\n")
    options = inputs.options(tmp_path / "out", "--image_root", inputs.folder, slides=str(table))
    with pytest.raises(HistoError, match=r"1 of 2 slides failed: .*glass.tif"):
        predict_slides(options)
    assert (tmp_path / "out" / "a" / "tiles.csv").is_file()
    with pytest.raises(HistoError, match="two slides of the name 'a'"):
        predict_slides(inputs.options(tmp_path / "out", slides=f"a.tif {inputs.folder / 'a.tif'}"))


def test_a_corrected_center_is_predicted_again(inputs: Inputs, tmp_path: Path) -> None:
    table, options = tmp_path / "slides.csv", ("--image_root", inputs.folder)
    table.write_text("slide,center\na.tif,1\nb.tif,1\n")
    predict_slides(inputs.options(tmp_path / "out", *options, slides=str(table)))
    table.write_text("slide,center\na.tif,1\nb.tif,2\n")
    with pytest.raises(HistoError, match="out/b: predicted with another center"):
        predict_slides(inputs.options(tmp_path / "out", *options, slides=str(table)))


def test_a_center_has_a_name_where_those_of_training_have(inputs: Inputs) -> None:
    grid = slides.Grid(np.zeros((1, 2), np.int64), 64, 64, 64, 0.5)
    slide = command.Listed("a", inputs.folder / "a.tif", "1")
    named = command.table_of(slide, grid, grid.corners, ["normal", "tumor"], ["1", "Leipzig"])
    assert center_names(named) == ["1"]
    numbered = command.table_of(slide, grid, grid.corners, ["normal", "tumor"])
    assert center_names(numbered) == [] and numbered["center"][0] == 1


def test_slides_of_an_earlier_command_keep_their_rows(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_slides(inputs.options(tmp_path / "out", slides="b.tif"))
    monkeypatch.chdir(inputs.folder)
    arguments = ["a.tif", "--adapter", inputs.adapter, "--output_dir", tmp_path / "out", "--num_workers", 0]
    predict_slides(parse_command(PredictSlidesOptions, None, list(map(str, arguments)), first="slides"))
    found = pd.read_csv(tmp_path / "out" / "slides.csv")
    assert found["slide"].tolist() == ["a", "b"] and (found["tiles"] == 48).all()
    predict_slides(inputs.options(tmp_path / "out", slides="a.tif"))  # its path written otherwise


def test_predict_with_slides_is_this_command(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], predicted: Path
) -> None:
    shared = ["--adapter", inputs.adapter, "--output_dir", predicted, "--num_workers", 0]
    main(["predict", *map(str, [inputs.folder / "a.tif", inputs.folder / "b.tif", *shared])])
    assert f"2 slides, 96 tiles: {predicted / 'slides.csv'}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["predict", *map(str, [inputs.folder / "glass.tif", *shared[:3], tmp_path / "out"])])
    assert "error: 1 of 1 slides failed" in capsys.readouterr().err


@pytest.mark.parametrize("aggregation", ["abmil", "max"])
def test_an_adapter_of_slide_labels_gives_a_score_and_attention(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aggregation: str
) -> None:
    monkeypatch.setattr(command, "slide_heat_map", slide_heat_map)
    backbone = inputs.folder / "backbone"
    head = heads.HeadConfig(aggregation=aggregation, attention_width=8)  # type: ignore[arg-type]
    adapter = write_adapter(tmp_path / "adapter", backbone, changes=OF_SLIDES, head=head)
    predict_slides(replace(inputs, adapter=adapter).options(tmp_path / "out", slides="a.tif"))
    table = pd.read_csv(tmp_path / "out" / "a" / "tiles.csv")
    (row,) = pd.read_csv(tmp_path / "out" / "slides.csv").to_dict("records")
    features = read_json(tmp_path / "out" / "a" / "tiles.geojson")["features"]
    odds = np.log(table["probability_tumor"] / table["probability_normal"])
    assert (tmp_path / "out" / "a" / "attention.png").is_file() == (aggregation == "abmil")
    if aggregation == "abmil":
        assert table["attention"].sum() == pytest.approx(1)
        assert np.ptp(table["attention"]) > 0
        assert [each["properties"]["measurements"]["attention"] for each in features] == table["attention"].tolist()
        logit = (table["attention"] * odds).sum()  # the classifier is linear
    else:
        assert "attention" not in table
        logit = odds.max()
    assert row["probability_tumor"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)
    assert row["probability_normal"] == pytest.approx(1 - row["probability_tumor"])
    assert row["predicted"] == ("tumor" if row["probability_tumor"] >= 0.5 else "normal")
