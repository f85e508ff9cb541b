"""A few generated images in the formats of published data sets, to see that a protocol runs; they hold no signal."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import h5py
import numpy as np
import PIL.Image
from numpy.typing import NDArray

SIZE = 32  # pixels


def write_multicenter(folder: Path) -> None:
    """`train.h5`, `val.h5` and `test.h5`, an HDF5 group for each image; two images are of one slide."""
    folder.mkdir(parents=True)
    for number, (split, count, centers) in enumerate((("train", 24, 3), ("val", 12, 1), ("test", 12, 1))):
        with h5py.File(folder / f"{split}.h5", "w") as file:
            for i in range(count):
                group = file.create_group(str(i))
                group["img"] = _image(100 * number + i).transpose(2, 0, 1)
                group["label"] = i % 2
                group["metadata"] = [5 * number + i // 2 % centers, 100 * number + i // 2]


def write_mri(folder: Path) -> None:
    """`Training/CLASS/` and `Testing/CLASS/` with the four classes of Kaggle's Brain Tumor Classification."""
    for number, (split, count) in enumerate((("Training", 10), ("Testing", 3))):
        for place, name in enumerate(("glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                path = folder / split / name / f"{i}.png"
                PIL.Image.fromarray(_image(1000 * number + 100 * place + i)).save(path)


def write_cytology(folder: Path) -> None:
    """Folders `sipakmed`, `mlcc` and `bcfc` with `images/SPLIT/CLASS_NUMBER.png`, and `hicervix` with its tables."""
    counts = {"train": 16, "val": 4, "test": 1}  # of each class, enough for 16 shots
    classes = {"sipakmed": 5, "mlcc": 4, "bcfc": 2}
    for split, count in counts.items():
        for data, number in classes.items():
            (folder / data / "images" / split).mkdir(parents=True)
            for i in range(number * count):
                path = folder / data / "images" / split / f"class{i % number}_{i}.png"
                PIL.Image.fromarray(_image(1000 * len(split) + i)).save(path)
        (folder / "hicervix" / split).mkdir(parents=True)
        rows = ["image_name,level_1,level_2,level_3"]
        for i in range(2 * count):
            PIL.Image.fromarray(_image(1000 * len(split) + i)).save(folder / "hicervix" / split / f"{i}.png")
            rows.append(f"{i}.png," + ("ASC,ASC-US,ASC-US-1", "AGC,AGC-NOS,AGC-NOS-1")[i % 2])
        (folder / "hicervix" / f"{split}.csv").write_text("\n".join(rows), encoding="utf-8")


def write_digits(folder: Path) -> None:
    """The four idx files of MNIST."""
    folder.mkdir(parents=True)
    for split, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count) % 10
        images = np.stack([_image(count + i)[:28, :28, 0] for i in range(count)])
        for name, array in ((f"{split}-images-idx3", images), (f"{split}-labels-idx1", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def _image(seed: int) -> NDArray[np.uint8]:
    """Noise, uint8 (SIZE, SIZE, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
