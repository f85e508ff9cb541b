"""Small data sets in the real file formats, which tests damage to check refusals."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import datasets
import h5py
import numpy as np
import PIL.Image
import torch

from hf_histo.data import schema

COUNTS = {"train": 12, "val": 6, "test": 4}
CENTERS = {"train": (0, 3, 4), "val": (1,), "test": (2,)}
HICERVIX = {  # the three levels of each image
    "a.png": ("ASC", "ASC-US", ""),
    "b.png": ("ASC", "ASC-H", ""),
    "c.png": ("AGC", "AGC-FN", "ECC"),
    "d.png": ("AGC", "AGC-FN", "EC"),
    "e.png": ("Normal", "", ""),
}


def images(count: int, size: int = 12, seed: int = 0) -> np.ndarray:
    """Random uint8 images (count, size, size + 2, 3), each with the values 0 and 255 in it; not square on purpose."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size + 2, 3), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = 0, 255
    return pixels


def write_challenge(
    directory: Path,
    *,
    counts: Mapping[str, int] = COUNTS,
    size: int = 12,
    dtype: str = "uint8",
    channels_first: bool = True,
    maximum: int = 255,
    metadata: int = 3,
    test_labels: bool = False,
) -> dict[str, np.ndarray]:
    """Write train.h5, val.h5 and test.h5; return each split's images as uint8 (N, H, W, 3), row i being of key str(i).

    Labels alternate 0, 1; slide i // 2 + 100 (500 in val, 900 in test) holds two images. `metadata` is its length, of
    [center, slide, label] (3), [center, label] (2), [center] (1) or none (0).
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for number, (split, count) in enumerate(counts.items()):
        written[split] = images(count, size, seed=number)
        with h5py.File(directory / f"{split}.h5", "w") as file:
            for i, image in enumerate(written[split]):
                group = file.create_group(str(i))
                stored = (image / 255 if maximum == 1 else image).astype(dtype)
                stored = stored.transpose(2, 0, 1) if channels_first else stored
                group.create_dataset("img", data=stored, compression="gzip", chunks=stored.shape)
                known = split != "test" or test_labels
                if known:
                    group["label"] = i % 2
                if metadata:
                    center, slide = CENTERS[split][i % len(CENTERS[split])], 100 + 400 * number + i // 2
                    label = i % 2 if known else -1
                    group["metadata"] = {1: [center], 2: [center, label], 3: [center, slide, label]}[metadata]
    return written


def write_pcam(directory: Path, *, meta: bool = True, size: int = 96) -> dict[str, np.ndarray]:
    """Write the six files of PatchCamelyon, and its tables where `meta`; return the patches by official split name."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for number, (split, count) in enumerate({"train": 7, "valid": 4, "test": 3}.items()):
        stem = f"camelyonpatch_level_2_split_{split}"
        written[split] = np.random.default_rng(number).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        with h5py.File(directory / f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=written[split], chunks=(3, size, size, 3), compression="gzip")
        with h5py.File(directory / f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(count, dtype=np.uint8) % 2).reshape(-1, 1, 1, 1)
        if meta:
            rows = [[i, 100, 200, f"camelyon16_{split}_{i // 2:03}"] for i in range(count)]
            write_csv(directory / f"{stem}_meta.csv", [["", "coord_y", "coord_x", "wsi"], *rows])
    return written


def write_wilds(directory: Path) -> list[Path]:
    """Write metadata.csv and 4 patches for train, 2 for id_val, val and test, in this order; return their paths."""
    header = ["", "patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split"]
    rows, paths = [], []
    # As in the original, `split` is 0 or 1 in the centers of val and test, too.
    for i, (center, split) in enumerate(
        [(0, 0), (3, 0), (4, 0), (0, 0), (3, 1), (4, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    ):
        patient, node = f"{4 + 10 * center:03}", i % 3
        rows.append([i, patient, node, 32 * i, 64 * i, i % 2, 5 + i, center, split])
        name = f"patient_{patient}_node_{node}"
        paths.append(directory / "patches" / name / f"patch_{name}_x_{32 * i}_y_{64 * i}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (96, 96, 4), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(paths[-1])  # RGBA, as the original files are
    write_csv(directory / "metadata.csv", [header, *rows])
    return paths


def write_image(path: Path, seed: int = 0) -> None:
    """Write random pixels, 11 wide and 9 to 11 high, in the format of the name's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9 + seed % 3, 11, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def write_named(folder: Path) -> Path:
    """Write cytology as files named by class: 3 images of each of two classes in each split."""
    for number, split in enumerate(("train", "val", "test")):
        for name in ("normal_columnar", "HSIL"):
            for i in range(3):
                write_image(folder / "images" / split / f"{name}_{i:03}.bmp", 10 * number + i)
    return folder


def write_lists(folder: Path) -> Path:
    """Write cytology as folders of two classes with lists of 3, 2 and 1 images and names of classes."""
    for name in ("hsil", "nl"):
        for i in range(4):
            write_image(folder / "images" / name / f"cell ({i}).png", i)
    (folder / "splits").mkdir()
    (folder / "splits" / "train.txt").write_text("nl/cell (0).png 0\nhsil/cell (0).png 1\n\nhsil/cell (1).png\n")
    (folder / "splits" / "valid.txt").write_text("images/nl/cell (2).png\nimages/hsil/cell (2).png\n")
    (folder / "splits" / "test.txt").write_text("images/nl/cell (3).png 0\n")
    (folder / "classnames.txt").write_text("nl normal cells\nhsil\n")
    return folder


def write_hicervix(folder: Path) -> Path:
    """Write the images and levels of `HICERVIX` as each split."""
    for number, split in enumerate(("train", "val", "test")):
        rows = ["image_name,class_id,level_1,level_2,level_3"]
        for i, (name, levels) in enumerate(HICERVIX.items()):
            write_image(folder / split / name, 10 * number + i)
            rows.append(",".join([name, str(i), *levels]))
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_csv(path: Path, rows: list[list[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(rows)


def truncate(path: Path) -> None:
    """Cut off the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damage_chunk(path: Path, key: str) -> None:
    """Overwrite the first bytes of the compressed data of the dataset `key` in an HDF5 file."""
    with h5py.File(path, "r") as file:
        offset = file[key].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as handle:
        handle.seek(offset)
        handle.write(b"\xff" * 16)


def stored(*images: torch.Tensor) -> datasets.Dataset:
    """A table of the schema with uint8 images (3, H, W)."""
    rows = [{"bytes": schema.encode_ppm(image.permute(1, 2, 0).numpy()), "path": None} for image in images]
    columns: dict[str, list[object]] = {"id": [], "label": [], "center": [], "group": []}
    for row in range(len(rows)):
        for name, value in (("id", str(row)), ("label", row % 2), ("center", 0), ("group", "")):
            columns[name].append(value)
    return datasets.Dataset.from_dict({"image": rows, **columns}, features=schema.features(["a", "b"]))
