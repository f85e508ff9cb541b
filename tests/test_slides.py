"""A run on slides: the same as on its patches as files, and an adapter that knows their resolution."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import PIL.Image
import pytest
from miniature import SIZE, write_backbone
from slide_files import write_slides

import hf_histo
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.result import Result


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A table of slides, one of their patches as PNG files, and a backbone."""
    folder = tmp_path_factory.mktemp("slides")
    table = write_slides(folder / "slides")
    full = load(table, patch_size=64)["full"]
    rows = []
    for sample, row in zip(ImageTable(full).__getitems__(range(len(full))), full.remove_columns("image"), strict=True):
        PIL.Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(folder / f"{row['id']}.png")
        label = full.features["label"].names[row["label"]]
        rows.append((f"{row['id']}.png", row["id"], label, "AB"[row["center"]], row["group"]))
    pd.DataFrame(rows, columns=["image", "id", "label", "center", "group"]).to_csv(folder / "files.csv", index=False)
    return table, folder / "files.csv", write_backbone(folder / "backbone")


def run(data: Path, backbone: Path, folder: Path, **options: object) -> Result:
    return hf_histo.fine_tune(
        data,
        backbone=backbone,
        output_dir=folder,
        image_size=SIZE,
        resize_size=SIZE,
        max_steps=3,
        per_device_train_batch_size=16,
        target_modules="last-conv",
        **options,
    )


def test_slides_train_as_their_patches_do(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    slides, files, backbone = sources
    of_slides, of_files = run(slides, backbone, tmp_path / "a", patch_size=64), run(files, backbone, tmp_path / "b")
    pd.testing.assert_frame_equal(of_slides.metrics, of_files.metrics)
    weights = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "a", tmp_path / "b")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    reading = Sidecar.read(tmp_path / "a" / "adapter").preprocessing.reading
    assert (reading.mpp, reading.patch_size) == (0.5, 64)
    assert Sidecar.read(tmp_path / "b" / "adapter").preprocessing.reading.mpp is None
    # Slides are predicted at the resolution of training, without an option.
    expected = of_slides.classifier(load(slides, patch_size=64)["full"])
    pd.testing.assert_frame_equal(of_slides.classifier(load(slides, reading=reading)["full"]), expected)
    with pytest.raises(HistoError, match=r"images were read with --mpp=1\.0, expected --mpp=0\.5 as in training"):
        of_slides.classifier(load(slides, patch_size=64, mpp=1.0)["full"])
