"""The digits recipe and the Pareto sweep as commands, on miniature digits."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from miniature import write_digits

from hf_histo.evaluation.predictions import Predictions
from hf_histo.inference import Classifier

Call = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 20 test images, brighter for a higher digit."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def call(backbone: Path, data: Path, shown_by: Call) -> Call:
    """Run a recipe quickly; return what it printed."""

    def call(recipe: str, output: Path, *more: str) -> str:
        quick = "--image_size=32 --resize_size=32 --num_train_epochs=1 --metric_for_best_model=accuracy"
        fixed = f"--data={data} --backbone={backbone} --output_dir={output}"
        return shown_by(recipe, *fixed.split(), *quick.split(), *more)

    return call


def test_digits_with_a_head_on_the_output_layer(call: Call, tmp_path: Path, data: Path) -> None:
    more = "--head=mlp --head_widths=8 --head_on=logits --train_output_layer --target_modules=last-conv --lora_rank=2"
    shown = call("digits_lora.py", tmp_path / "run", *more.split())
    assert "| test " in shown
    adapter = tmp_path / "run" / "adapter"
    sizes = json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))["parameters"]
    assert f"trainable parameters: {sizes['trainable']:,} of {sizes['total']:,}" in shown
    assert "| parameters" in (adapter / "README.md").read_text(encoding="utf-8")
    splits = json.loads((adapter / "hf_histo.json").read_text(encoding="utf-8"))["data"]["splits"]
    assert {split: held["images"] for split, held in splits.items()} == {"train": 50, "val": 10, "test": 20}
    saved = Predictions.read(adapter / "predictions" / "test.parquet")
    digit = np.frombuffer(gzip.decompress((data / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, 256, 16)
    found = Classifier.from_pretrained(adapter)(digit.reshape(16, 16))
    np.testing.assert_allclose(found.logits[0], saved.logits[0], rtol=0, atol=1e-5)


def test_a_sweep_draws_its_front_and_resumes(call: Call, tmp_path: Path) -> None:
    more = ["--layers", "last-conv", r".*layer3.*conv1", "--learning_rate=0.01", "--lora_rank=4", "--lora_alpha=8"]
    shown = call("pareto.py", tmp_path / "out", *more, "--ranks", "1", "2")
    names = {f"{layers}-rank-{rank}" for layers in ("last-conv", "layer3-conv1") for rank in (1, 2)}
    names |= {"classifier-alone"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "pareto.md", "pareto.json", "pareto.png"}
    written = json.loads((tmp_path / "out" / "pareto.json").read_text(encoding="utf-8"))
    points = written["points"]
    assert points.keys() == names
    assert written["split"] == "val"
    assert set(written["front"]) <= names
    sizes = {name: point["trainable"] for name, point in points.items()}
    assert (
        sizes["last-conv-rank-2"] - sizes["last-conv-rank-1"] == sizes["last-conv-rank-1"] - sizes["classifier-alone"]
    )
    for name in names:
        adapter = tmp_path / "out" / name / "seed-0" / "adapter"
        overall = json.loads((adapter / "metrics.json").read_text())["splits"]["val"]["overall"]
        assert points[name]["mean"] == overall["accuracy"]["value"]
        assert f"| {name} " in shown
        if name != "classifier-alone":
            lora = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
            assert lora["lora_alpha"] == 2 * lora["r"]
    with PIL.Image.open(tmp_path / "out" / "pareto.png") as image:
        assert image.width > 600

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/seed-0/adapter/metrics.json")}
    call("pareto.py", tmp_path / "out", *more, "--ranks", "1", "2", "--front_split=test")
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert json.loads((tmp_path / "out" / "pareto.json").read_text(encoding="utf-8"))["split"] == "test"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--layers all-conv --ranks 2 0", "--ranks is 0, expected at least 1"),
        ("--layers all-conv --seeds=0", "--seeds is 0"),
        ("--layers all-conv --ranks 4 --adapter ia3", "--adapter ia3: has no rank"),
        ("--layers all-conv all-conv --ranks 1", "give all-conv-rank-1 twice"),
        ("--ranks 1", "--layers"),
        ("--layers no-such --ranks 1", "--target_modules 'no-such' matches no layer"),
        ("--layers all-conv --method=linear", "--method is 'linear', which can't act here"),
    ],
)
def test_bad_options_of_the_sweep(call: Call, tmp_path: Path, more: str, message: str) -> None:
    lines = [line for line in call("pareto.py", tmp_path / "out", *more.split()).splitlines() if "error: " in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_split_without_labels_is_refused(call: Call, tmp_path: Path, data: Path) -> None:
    only = tmp_path / "train_only"
    only.mkdir()
    for path in data.glob("train-*"):
        (only / path.name).write_bytes(path.read_bytes())
    shown = call("pareto.py", tmp_path / "out", f"--data={only}", "--layers", "all-conv", "--front_split=test")
    assert "--front_split is test, expected a split with labels" in shown
