"""Backbones and runs small enough for a test: random weights, saved as a local folder."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import h5py
import numpy as np
import pandas as pd
import PIL.Image
import torch
from fixtures import write_challenge
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter.sidecar import BackboneRecord, DataRecord, Sidecar
from hf_histo.config import AdapterOptions, Config, parse
from hf_histo.data.splits.checks import Composition
from hf_histo.models import adapters, backbones, batchnorm
from hf_histo.models.model_size import account
from hf_histo.transforms import preprocessing

COUNTS = {"train": 24, "val": 13, "test": 7}
SIZE = 32
OF_SLIDES = {"mpp": 0.5, "patch_size": 64}  # what an adapter knows of the slides that it was trained on


def write_backbone(folder: Path, name: str = "test_resnet.r160_in1k", seed: int = 0) -> Path:
    """Save a timm test model with random weights, and the batch-norm statistics of its activations."""
    torch.manual_seed(seed)
    model = backbones.load(name, 10, random_weights=True)
    # Statistics of real activations: with initial ones, all features and logits would be nearly equal.
    for layer in batchnorm.layers(model).values():
        layer.momentum = 1.0
        layer.weight.data.uniform_(0.5, 1.5)
    with torch.no_grad():
        model.train()(pixel_values=torch.randn(16, 3, 96, 96) + torch.randn(16, 3, 1, 1))
    model.save_pretrained(folder)
    return folder


def write_hf_vit(folder: Path) -> Path:
    """Save a vision transformer of transformers with random weights, for images of `SIZE` pixels, and its processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=SIZE, patch_size=8, num_labels=10)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path,
    backbone: Path,
    *,
    seed: int = 0,
    outputs: int = 1,
    changes: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Path:
    """Save an adapter folder as a run leaves it, with random LoRA weights in place of trained ones.

    `changes` are of the fields of its preprocessing: `OF_SLIDES` for one that was trained on patches of slides.
    `options` are those of `Sidecar`, and of `AdapterOptions` as `lora`.
    """
    torch.manual_seed(seed)
    names = ["normal", "tumor", "other"][: max(2, outputs)]
    lora = options.pop("lora", None) or AdapterOptions(target_modules="last-conv")
    head = options.get("head")
    model = backbones.load(str(backbone), outputs, image_size=SIZE, head=head)
    views = replace(preprocessing.resolve(model.config, str(backbone), SIZE, SIZE), **changes)
    held = Composition(0, 0, 0, dict.fromkeys(names, 0), {}, copies_of_train=0, groups_of_train=0)
    sidecar = Sidecar(
        **{
            "method": lora.method,
            "label_names": names,
            "num_outputs": outputs,
            "backbone": BackboneRecord(str(backbone), None, *backbones.identity(model)),
            "batch_norm": "frozen",
            "preprocessing": views,
            "data": DataRecord("miniature", "0", dict.fromkeys(COUNTS, held)),
            **options,
        }
    )
    adapted = adapters.add(model, lora)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.1)
    selection = {"split": "val", "metric": "auroc", "value": 1.0, "step": 1}
    metrics = {"selection": selection, "splits": {}, "options": {"hub_license": "unknown", "split": "files"}}
    metrics |= account(adapted, batch_norm=sidecar.batch_norm)
    adapter_folder.save(folder, adapted, sidecar, metrics=metrics, tables={})
    return folder


def write_data(folder: Path, counts: Mapping[str, int] = COUNTS) -> Path:
    """Save a challenge folder of `counts` images of `SIZE` pixels; those of label 1 are darker."""
    write_challenge(folder, counts=counts, size=SIZE, test_labels=True)
    for path in folder.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            for group in file.values():
                if group["label"][()] == 1:
                    group["img"][...] = group["img"][...] // 3
    return folder


def write_centers(folder: Path) -> tuple[Path, Path]:
    """Save a backbone, and a data set whose training images are of two centers."""
    data = write_data(folder / "data")
    divide_training(data)
    return write_backbone(folder / "backbone"), data


def write_shards(folder: Path, *, each: tuple[int, ...] = (12,) * 4) -> Path:
    """Save shards for streaming, `each` being their numbers of images; images of odd number are darker."""
    features = datasets.Features(
        {"id": datasets.Value("string"), "scan": datasets.Image(), "finding": datasets.ClassLabel(names=["no", "yes"])}
    )
    folder.mkdir(parents=True)
    number = 0
    for shard, count in [*enumerate(each), ("validation", 13)]:
        rows: dict[str, list[Any]] = {"id": [], "scan": [], "finding": []}
        for _ in range(count):
            image = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            rows["id"].append(f"image {number}")
            rows["scan"].append(image // (1 + 2 * (number % 2)))
            rows["finding"].append(number % 2)
            number += 1
        name = f"train-{shard:05}-of-{len(each):05}" if isinstance(shard, int) else shard
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{name}.parquet"))
    return folder


def write_image_table(folder: Path, count: int = 72) -> Path:
    """Save `table/images.csv` with images of two classes from three named centers, in splits; odd ones are darker.

    Each column is there twice, under its usual name and, with other values, under another one; and other images with
    the same names lie in `table/other`.
    """
    rows = []
    for number in range(count):
        for place, seed in (("images", number), ("other/images", count + number)):
            image = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            (folder / "table" / place).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image // (1 + 2 * (number % 2))).save(folder / "table" / place / f"{number}.png")
        patient, center, last = number // 2, ("Leipzig", "Halle", "Jena")[number // 2 % 3], (count - 1 - number) // 2
        split, part = (("train", "train", "val", "test")[(number // 6 + shift) % 4] for shift in (0, 1))
        rows.append(
            {"image": f"images/{number}.png", "picture": f"images/{count - 1 - number}.png"}
            | {"label": ("normal", "tumor")[number % 2], "finding": ("normal", "tumor")[number // 2 % 2]}
            | {"id": f"scan {number}", "key": f"{number:03}", "split": split, "part": part}
            | {"center": center, "department": number // 2 % 2, "patient": f"P{patient}", "person": f"{last}"}
        )
    pd.DataFrame(rows).to_csv(folder / "table" / "images.csv", index=False)
    return folder / "table" / "images.csv"


def write_bags(folder: Path, groups: int = 24, size: int = 6) -> Path:
    """Save `bags.csv` with images of groups of two classes and centers, in splits; a tumor group has one dark image."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for group in range(groups):
        split, label = ("train", "train", "val", "test")[group // 2 % 4], ("normal", "tumor")[group % 2]
        for number in range(size):
            image = np.random.default_rng([group, number]).integers(120, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            if label == "tumor" and number == group % size:
                image //= 4
            PIL.Image.fromarray(image).save(folder / "images" / f"{group}_{number}.png")
            rows.append((f"images/{group}_{number}.png", label, split, group // 4 % 2, f"G{group}"))
    pd.DataFrame(rows, columns=["image", "label", "split", "center", "group"]).to_csv(folder / "bags.csv", index=False)
    return folder / "bags.csv"


def divide_training(folder: Path) -> None:
    """Divide the training images of a `write_data` folder between centers 0 and 3; a slide, two images, is in one."""
    with h5py.File(folder / "train.h5", "r+") as file:
        for key, group in file.items():
            group["metadata"][0] = 3 * (int(key) // 2 % 2)


def config(folder: Path, backbone: Path, data: Path, *more: str) -> Config:
    """Options of a run in `folder` that takes about a second per epoch; `more` wins."""
    quick = f"--image_size={SIZE} --resize_size={SIZE} --per_device_train_batch_size=8 --num_train_epochs=2"
    fixed = f"--output_dir={folder} --backbone={backbone} --data={data} --learning_rate=0.01"
    return parse(None, [*quick.split(), *fixed.split(), *more])


def write_slices(folder: Path, classes: Sequence[str]) -> Path:
    """Save MRI slices of three classes in folders, brighter for a later class; a third of the test ones are copies."""
    for split, numbers in (("Training", range(36)), ("Testing", [*range(6), *range(50, 62)])):
        for number in numbers:
            path = folder / split / classes[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 120, (40, 34 + number % 3)) + 60 * (number % 3)
            PIL.Image.fromarray(np.uint8(pixels)).save(path)
    return folder


def write_digits(folder: Path) -> Path:
    """Save 60 training and 20 test digits in idx files, brighter for a higher one."""
    folder.mkdir()
    for split, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count) % 10
        images = np.random.default_rng(0).integers(0, 50, (count, 16, 16)) + 20 * labels[:, None, None]
        for name, array in ((f"{split}-images-idx3", images), (f"{split}-labels-idx1", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    return folder
