"""The memory of a run does not grow with the number of images."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soak
from datasets.arrow_writer import ArrowWriter
from fixtures import write_challenge
from miniature import write_backbone

from hf_histo.data import schema
from hf_histo.data.load import check_trainable
from hf_histo.data.schema import ImageTable
from hf_histo.data.splits.checks import shared_groups
from hf_histo.training import losses
from hf_histo.transforms.pipeline import collate

STATUS = Path("/proc/self/status")
PATCHES, LIMIT = 200_000, 4 * 2**30


def write(path: Path, rows: int, side: int) -> datasets.Dataset:
    """A mapped table of `rows` images, hundreds of them alike."""
    image = {"bytes": schema.encode_ppm(np.zeros((side, side, 3), dtype=np.uint8)), "path": None}
    with ArrowWriter(path=str(path), features=schema.features(("normal", "tumor"))) as writer:
        for group in range(rows // 100):
            numbers = range(100 * group, 100 * (group + 1))
            columns = {"id": list(map(str, numbers)), "image": [image] * 100, "label": [row % 2 for row in numbers]}
            writer.write_batch({**columns, "center": [0] * 100, "group": [str(group)] * 100})
        writer.finalize()
    return datasets.Dataset.from_file(str(path))


def own_memory() -> int:
    """Bytes of this process that are not backed by a file (those of a mapped table can be reclaimed at any time)."""
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize(
    ("few", "many", "side"), [(200, 20_000, 60), pytest.param(10_000, 1_000_000, 16, marks=pytest.mark.slow)]
)
def test_a_hundred_times_the_images_take_no_more_memory(tmp_path: Path, few: int, many: int, side: int) -> None:
    small, large = write(tmp_path / "small.arrow", few, side), write(tmp_path / "large.arrow", many, side)

    def begin_training(rows: datasets.Dataset) -> ImageTable:
        check_trainable(rows)
        shared_groups({"train": rows, "val": small})
        losses.balancing_weights(rows["label"], ["normal", "tumor"])
        images = ImageTable(rows)
        assert images.is_of_one_size()
        images.fingerprint()
        order = np.random.default_rng(0).permutation(len(images))[:200]
        for some in np.split(order, 10):
            collate(images.__getitems__(some.tolist()))
        return images

    begin_training(small)  # what is loaded and allocated once
    before = own_memory()
    images = begin_training(large)
    stored, more = len(images) * 3 * side**2, own_memory() - before
    print(f"{many} rows, {stored / 2**20:.0f} MiB: {before / 2**20:.0f} MiB with {few}, {more / 2**20:.1f} MiB more")
    assert stored > 200e6
    assert more < 0.1 * stored


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's account of a process's memory")
def test_an_epoch_over_200_000_patches_within_4_gib(tmp_path: Path) -> None:
    """A run from HDF5 files to predictions, in which each process and all together stay below the limit."""
    write_challenge(tmp_path / "data", counts={"train": PATCHES, "val": 600}, size=32)
    folders = f"--data={tmp_path / 'data'} --cache_dir={tmp_path / 'cache'} --output_dir={tmp_path / 'run'}"
    model = f"--backbone={write_backbone(tmp_path / 'backbone')} --target_modules=last-conv --image_size=32"
    training = "--num_train_epochs=1 --per_device_train_batch_size=256 --num_workers=2"
    started = subprocess.Popen(
        [sys.executable, str(soak.RECIPE), *f"{folders} {model} {training}".split()],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
    )
    most = max(tree for _, _, tree, _ in soak.watch(started, every=1))
    print(f"{most / 2**20:,.0f} MiB at most")
    assert started.returncode == 0
    assert (tmp_path / "run" / "adapter").is_dir()
    assert most < LIMIT
