"""Streaming of generated shards: each image once per epoch over all processes, and exact resumption within an epoch."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from miniature import config, write_backbone, write_shards

from hf_histo import finetune
from hf_histo.config import parse
from hf_histo.data.load import load
from hf_histo.data.readers import streaming
from hf_histo.data.readers.hub import train_stream
from hf_histo.errors import HistoError
from hf_histo.launch import Interrupted
from hf_histo.training import trainer

SHARDS, EACH = 4, 12
STREAMED = ["--streaming", "--target_modules=last-conv", "--lora_dropout=0.1"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


def part(shards: Path, rank: int = 0, processes: int = 1, total: int = SHARDS * EACH) -> streaming.Stream:
    return train_stream(f"hub:{shards}", total, 0, rank, processes, None)


def names(of: streaming.Stream, epoch: int = 0) -> list[str]:
    of.set_epoch(epoch)
    return of.ids([sample["index"] for sample in of])


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_image_once_among_the_processes(shards: Path, processes: int, epoch: int) -> None:
    seen = [names(part(shards, rank, processes), epoch) for rank in range(processes)]
    assert {len(found) for found in seen} == {SHARDS * EACH // processes}
    assert Counter(chain(*seen)) == Counter(f"image {i}" for i in range(SHARDS * EACH))


def test_the_order_is_a_function_of_seed_and_pass(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, second = names(part(shards)), names(part(shards)), names(part(shards), 1)
    assert first == again != second
    assert first != sorted(first, key=lambda name: int(name.split()[1]))
    monkeypatch.setattr(streaming, "BUFFER", 4)  # more than one buffer in a pass
    assert Counter(names(part(shards))) == Counter(first)


def test_shards_of_different_sizes_give_every_process_as_much(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", each=(12, 4))
    seen = [names(part(shards, rank, 2, 16)) for rank in range(2)]
    assert [len(found) for found in seen] == [8, 8]


def test_an_address_of_object_storage(shards: Path) -> None:
    assert Counter(names(train_stream(f"hub:file://{shards}", 48, 0, 0, 1, None))) == Counter(names(part(shards)))


def test_nothing_of_the_training_images_is_kept(shards: Path, tmp_path: Path) -> None:
    options = parse(None, [f"--data=hub:{shards}", "--streaming", f"--cache_dir={tmp_path / 'cache'}"])
    data = load(options.data)
    assert {split: len(rows) for split, rows in data.items()} == {"train": 48, "val": 13}
    assert data["train"]["label"][:].count(1) == 24
    assert set(data["train"].with_format("arrow")["image"][:].to_pylist()) == {None}
    assert not (tmp_path / "cache").exists()


def test_a_streamed_run_that_is_stopped_in_a_pass_resumes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = write_backbone(tmp_path / "backbone")
    trained: list[int] = []
    build = trainer.build

    def watched(stop: int | None) -> Any:
        def build_watched(*args: Any, **kwargs: Any) -> trainer.Trainer:
            session = build(*args, **kwargs)
            step = session.compute_loss

            def compute_loss(model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
                if model.training:
                    trained.extend(inputs["index"].tolist())
                    if stop is not None and session.state.global_step == stop:
                        os.kill(os.getpid(), signal.SIGTERM)
                return step(model, inputs, *more, **options)

            monkeypatch.setattr(session, "compute_loss", compute_loss)
            return session

        return build_watched

    def run(folder: Path, stop: int | None) -> bytes:
        monkeypatch.setattr(trainer, "build", watched(stop))
        options = config(folder, backbone, Path(f"hub:{shards}"), *STREAMED)
        result = finetune.run_config(options, load(options.data))
        return (result.adapter / "adapter_model.safetensors").read_bytes()

    straight = run(tmp_path / "straight", None)
    passes, trained = [trained[:48], trained[48:]], []
    assert [len(set(seen)) for seen in passes] == [48, 48]
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped", 7)
    state = json.loads((tmp_path / "stopped" / "checkpoint-8" / "trainer_state.json").read_text())
    assert 1 < state["epoch"] < 2
    assert run(tmp_path / "stopped", None) == straight
    assert trained == [*chain(*passes)]


@pytest.mark.parametrize("more", ["--num_workers=2", "--preview", "--normalization=rgb", "--data=folder"])
def test_what_streaming_does_not_support(more: str) -> None:
    with pytest.raises(HistoError, match="--streaming"):
        parse(None, ["--data=hub:x/y", "--streaming", more])


def test_a_missing_image_is_refused() -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"image": None, "label": 0}]), features=features)
    with pytest.raises(HistoError, match=r"^--streaming: an image is missing, expected its bytes in the shard"):
        list(streaming.Stream(rows, image="image", label="label", total=1, seed=0))


def test_images_that_are_paths_are_refused(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.IterableDataset.from_generator(
        lambda: iter([{"image": {"bytes": None, "path": "/etc/hostname"}, "label": 0}]), features=features
    )
    with pytest.raises(HistoError, match=r"an image is the path /etc/hostname, expected its bytes"):
        list(streaming.Stream(rows, image="image", label="label", total=1, seed=0))


def test_shards_without_an_image_are_refused() -> None:
    """A process without images, while others have some, would otherwise wait for its next image for ever."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.IterableDataset.from_generator(lambda: iter(()), features=features)
    with pytest.raises(HistoError, match="the shards of a process hold no image"):
        list(streaming.Stream(rows, image="image", label="label", total=1, seed=0))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_without_an_image_is_refused(split: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", each=(12,))
    (path,) = shards.glob(f"{split}*")
    schema = pq.read_schema(path)
    pq.ParquetWriter(path, schema).close()
    options = parse(None, [f"--data=hub:{shards}", "--streaming", f"--cache_dir={tmp_path / 'cache'}"])
    with pytest.raises(HistoError, match=f"{split} has no image, expected some; add images"):
        load(options.data)


def test_a_damaged_shard_is_named_as_such(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", each=(12,))
    (path,) = shards.glob("train*")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)  # the first page, behind the magic number
    path.write_bytes(content)
    with pytest.raises(HistoError, match=r"--streaming: a shard can't be read .*, expected a complete one; replace it"):
        list(part(shards, total=12))


def test_a_stream_prepares_its_images(shards: Path) -> None:
    small = train_stream(f"hub:{shards}", 48, 0, 0, 1, lambda image: image[:, :8, :8])
    assert {tuple(sample["image"].shape) for sample in small} == {(3, 8, 8)}
    assert isinstance(next(iter(small))["image"], torch.Tensor)
