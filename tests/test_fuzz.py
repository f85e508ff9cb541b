"""Mutated files: for any bytes, readers and parsers return a result or raise `HistoError`.

Each batch of files runs in a forked process, so that a crash of a C library is found as well. Files that failed once
are kept in tests/corpus, by kind.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import nibabel
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures import images, write_challenge, write_hicervix, write_lists, write_pcam, write_wilds

from hf_histo.adapter.files import SIDECAR
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import DataOptions, parse
from hf_histo.data.load import load
from hf_histo.data.readers import hub
from hf_histo.data.schema import decode, encode_ppm
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions

CORPUS = Path(__file__).parent / "corpus"
BATCH = 250
MEMORY = 4 * 2**30  # more than any small file may take
TOKENS = [b"\x00" * 4, b"\xff" * 4, b"\xff" * 8, b"\x00\x00\x00\x80", b"../", b"[" * 64, b"NaN", b"1e999", b"null"]


def mutate(content: bytes, random: random.Random) -> bytes:
    """Flip bits, overwrite, cut out, repeat or insert a piece, once to eight times; or cut the end off."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        place = random.randrange(len(data) + 1)
        kind = random.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            piece = random.choice(TOKENS)
            data[place : place + len(piece)] = piece
        elif kind == 2:
            del data[place : place + random.randrange(1, 64)]
        elif kind == 3:
            data[place:place] = random.choice(TOKENS)
        elif kind == 4:
            piece = data[place : place + random.randrange(1, 64)]
            data[place:place] = piece
        elif random.random() < 0.2:
            del data[place:]
        elif place < len(data):
            data[place] = random.randrange(256)
    return bytes(data)


def sidecar(folder: Path) -> bytes:
    views = {"image_size": 32, "resize_size": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    color = {"method": "rgb", "reference": [[0.5] * 3, [0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1]]}
    return json.dumps(
        {
            "method": "lora",
            "label_names": ["normal", "tumor"],
            "num_outputs": 1,
            "backbone": {"name": "builtin", "revision": None, "fingerprint": "0"},
            "batch_norm": "frozen",
            "preprocessing": views,
            "normalizer": color | {"0": color["reference"]},
            "data": {"name": "x", "fingerprint": "0", "counts": {"train": 1}},
            "head": {"widths": [8], "on": "features", "train_output_layer": False, "softmax": False},
            "thresholds": {"validation": 0.4},
            "threshold": 0.5,
            "temperature": 1.5,
        }
    ).encode()


def file_of(write: Callable[[Path], object], name: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        write(folder)
        return (folder / name).read_bytes()

    return make


def folder_of_images(folder: Path) -> None:
    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(images(1)[0]).save(folder / split / label / "1.png")


def volumes(suffix: str, folder: Path) -> None:
    for label in ("a", "b"):
        (folder / label).mkdir(exist_ok=True)
        nibabel.Nifti1Image(images(1)[0], np.eye(4)).to_filename(folder / label / f"1.{suffix}")


def digits(folder: Path) -> None:
    pixels, labels = np.zeros((20, 4, 4), np.uint8), np.arange(20, dtype=np.uint8) % 10
    for name, magic, array in (("images-idx3", 0x803, pixels), ("labels-idx1", 0x801, labels)):
        header = np.array([magic, *array.shape], ">u4").tobytes()
        (folder / f"train-{name}-ubyte").write_bytes(header + array.tobytes())


def pixels(suffix: str, folder: Path) -> None:
    """Gray images of 4 x 4 pixels as the rows of a table."""
    values, labels, path = np.arange(96, dtype=np.uint8).reshape(6, 16), ["a", "b"] * 3, folder / f"train.{suffix}"
    table = pd.DataFrame(values, columns=list(map(str, range(16)))).assign(label=labels, patient=labels)
    if suffix == "npz":
        np.savez_compressed(path, images=values, y=labels, patient=labels)
    else:
        table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)


def shards(folder: Path) -> None:
    """As the Hub stores a data set: a table with columns of images and of class labels."""
    features = datasets.Features({"scan": datasets.Image(), "finding": datasets.ClassLabel(names=["no", "yes"])})
    scans = [PIL.Image.fromarray(image) for image in images(4)]
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_dict({"scan": scans, "finding": [0, 1, 0, 1]}, features=features)
        rows.to_parquet(str(folder / f"{split}.parquet"))


def arrow_shards(folder: Path) -> None:
    """As `shards`, in Arrow's own format."""
    shards(folder)
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        with pa.ipc.new_stream(str(path.with_suffix(".arrow")), table.schema) as writer:
            writer.write_table(table)
        path.unlink()


def table(folder: Path) -> None:
    made = Predictions.make(range(4), [0] * 4, [""] * 4, [0, 1, 0, 1], [0.5, -1.0, 2.0, 0.1])
    made.with_label_names(["normal", "tumor"]).write(folder / "val.parquet")


def image(format: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        PIL.Image.fromarray(images(1)[0]).save(folder / "image", format)
        return (folder / "image").read_bytes()

    return make


def loads(folder: Path) -> None:
    load(folder, cache_dir=folder / "cache")


def loads_by_name(folder: Path) -> None:
    load(f"hub:{folder}", cache_dir=folder.parent / "cache")


def streams(folder: Path) -> None:
    name = f"hub:{folder}"
    data = load(DataOptions(data=name, streaming=True), cache_dir=folder.parent / "cache")
    list(hub.train_stream(name, len(data["train"]), 0, 0, 1, None))


def reads_sidecar(folder: Path) -> None:
    Sidecar.read(folder)


def reads_yaml(folder: Path) -> None:
    parse(None, ["--config", str(folder / "run.yaml")])


PCAM = "camelyonpatch_level_2_split_valid"
# By kind: the file that is mutated, how it and its neighbors are written, what reads it.
KINDS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], object]]] = {
    **{
        kind: (name, file_of(write, name), loads)
        for kind, name, write in (
            ("challenge", "val.h5", lambda folder: write_challenge(folder, counts={"train": 4, "val": 3})),
            ("pcam", f"{PCAM}_x.h5", partial(write_pcam, size=8)),
            ("pcam-labels", f"{PCAM}_y.h5", partial(write_pcam, size=8)),
            ("pcam-table", f"{PCAM}_meta.csv", partial(write_pcam, size=8)),
            ("wilds-table", "metadata.csv", write_wilds),
            ("folder-image", "train/a/1.png", folder_of_images),
            ("list", "splits/train.txt", write_lists),
            ("class-names", "classnames.txt", write_lists),
            ("hicervix-table", "train.csv", write_hicervix),
            ("volume", "a/1.nii", partial(volumes, "nii")),
            ("packed-volume", "a/1.nii.gz", partial(volumes, "nii.gz")),
            ("idx-images", "train-images-idx3-ubyte", digits),
            ("idx-labels", "train-labels-idx1-ubyte", digits),
            ("pixels-csv", "train.csv", partial(pixels, "csv")),
            ("pixels-parquet", "train.parquet", partial(pixels, "parquet")),
            ("pixels-npz", "train.npz", partial(pixels, "npz")),
        )
    },
    "hub": ("train.parquet", file_of(shards, "train.parquet"), loads_by_name),
    "streamed": ("train.parquet", file_of(shards, "train.parquet"), streams),
    "hub-arrow": ("train.arrow", file_of(arrow_shards, "train.arrow"), loads_by_name),
    "streamed-arrow": ("train.arrow", file_of(arrow_shards, "train.arrow"), streams),
    "sidecar": (SIDECAR, sidecar, reads_sidecar),
    "yaml": ("run.yaml", lambda folder: b"seed: 3\nlora_rank: 4\ndata: x\nhead: mlp\n", reads_yaml),
    "predictions": ("val.parquet", file_of(table, "val.parquet"), lambda f: Predictions.read(f / "val.parquet")),
    "ppm": ("image", lambda folder: encode_ppm(images(1)[0]), lambda f: decode((f / "image").read_bytes())),
    **{
        format.lower(): ("image", image(format), lambda f: decode((f / "image").read_bytes()))
        for format in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")
    },
}


def _batch(kind: str, folder: str, contents: list[bytes], failures: str) -> None:
    """Read all contents in turn; record the current one, and those not refused properly."""
    name, _, read = KINDS[kind]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # else 5 seconds after each pass over a stream
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number, content in enumerate(contents):
        (Path(failures) / "at").write_text(str(number))
        (Path(folder) / name).write_bytes(content)
        try:
            _ends_well(read, Path(folder))
        except BaseException:
            (Path(failures) / str(number)).write_text(traceback.format_exc())
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > before + MEMORY:
            (Path(failures) / str(number)).write_text("took more memory than it may")
            return


def _ends_well(read: Callable[[Path], object], folder: Path) -> None:
    try:
        read(folder)
    except HistoError as error:
        assert "\n" not in str(error) and len(str(error)) < 5000, error


def check(kind: str, contents: list[bytes], folder: Path) -> None:
    name, make, _ = KINDS[kind]
    (folder / "files").mkdir(parents=True)
    make(folder / "files")
    if not (folder / "files" / name).parent.is_dir():
        (folder / "files" / name).parent.mkdir(parents=True)
    for start in range(0, len(contents), BATCH):
        failures = folder / f"failures{start}"
        failures.mkdir()
        batch = contents[start : start + BATCH]
        process = multiprocessing.get_context("fork").Process(
            target=_batch, args=(kind, str(folder / "files"), batch, str(failures))
        )
        process.start()
        process.join(600)
        crashed = process.exitcode != 0
        if process.is_alive():
            process.kill()
            process.join()
        found = {int(path.name): path.read_text() for path in failures.iterdir() if path.name != "at"}
        if crashed:
            found[int((failures / "at").read_text())] = f"ended with exit code {process.exitcode}, or hung"
        for number, error in found.items():
            kept = folder / f"{kind}-{start + number}"
            kept.write_bytes(batch[number])
            pytest.fail(f"{kept}: {error}")
        shutil.rmtree(folder / "files" / "cache", ignore_errors=True)


def mutants(kind: str, count: int, seed: int, folder: Path) -> list[bytes]:
    folder.mkdir()
    original = KINDS[kind][1](folder)
    return [mutate(original, random.Random(f"{kind} {seed} {i}")) for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    slow = KINDS[kind][2] in (loads, loads_by_name, streams)
    check(kind, mutants(kind, 10 if slow else 60, 0, tmp_path / "original"), tmp_path / "run")


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*")), ids=lambda path: path.name)
def test_what_once_failed(path: Path, tmp_path: Path) -> None:
    check(path.name.rsplit("-", 1)[0], [path.read_bytes()], tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutated_files(kind: str, tmp_path: Path) -> None:
    check(kind, mutants(kind, 10_000, 1, tmp_path / "original"), tmp_path / "run")
