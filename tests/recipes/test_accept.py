"""A verdict on a site as a command: the page and the record, with labels and with images to compare features with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from fixtures import write_challenge
from miniature import SIZE, config, write_centers, write_data

from hf_histo.data.protocol import prepare
from hf_histo.finetune import run_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The adapter of a short run, and a site with 30 images."""
    folder = tmp_path_factory.mktemp("trained")
    backbone, data = write_centers(folder)
    options = config(folder / "run", backbone, data, "--method=linear", f"--cache_dir={folder / 'cache'}")
    site = write_data(folder / "site", {"test": 30})
    return run_config(options, prepare(options)).adapter, site / "test.h5"


def test_a_verdict_with_its_page_and_record(
    trained: tuple[Path, Path], tmp_path: Path, shown_by: Callable[..., str]
) -> None:
    adapter, site = trained
    common = f"--adapter {adapter} --data {site} --cache_dir {tmp_path / 'cache'} --output_dir".split()
    shown = shown_by("accept.py", *common, str(tmp_path / "plain"))
    found = json.loads((tmp_path / "plain" / "acceptance.json").read_text())
    page = (tmp_path / "plain" / "acceptance.html").read_text()
    assert shown.startswith(f"{found['verdict']}: {found['reasons'][0]}")
    assert f"<b>{found['verdict']}</b>" in page and ":root { color-scheme" in page and "http" not in page
    assert (found["images"], found["groups"], found["labeled"], found["compared"]) == (30, 15, 0, "log odds")
    assert 0 < found["evidence"]["shift"]["p_value"] <= 1 and found["evidence"]["labeled"] is None
    assert found["predicted"].keys() == {"atc", "importance"} and found["transductive"] == []

    alike = write_data(tmp_path / "alike", {"train": 4, "val": 24, "test": 4})
    more = ["--labels", str(site), "--reference", str(alike), "--tolerance", "0.99"]
    shown = shown_by("accept.py", *common, str(tmp_path / "labels"), *more)
    found = json.loads((tmp_path / "labels" / "acceptance.json").read_text())
    assert shown.startswith("accept: by its labels, the accuracy, a mean over groups, is between")
    assert (found["labeled"], found["compared"]) == (30, "features")
    assert found["evidence"]["shift"]["groups"][0] == 12  # two images each of the 24 of val
    assert found["adapter"] == adapter.parent.name

    shown = shown_by("accept.py", *common, str(tmp_path / "plain"))
    assert "already holds acceptance.json" in shown


def test_where_colors_differ_no_interval_of_the_predicted_accuracy_is_given(
    trained: tuple[Path, Path], tmp_path: Path, shown_by: Callable[..., str]
) -> None:
    adapter, site = trained
    shutil.copy(site, tmp_path / "stained.h5")
    with h5py.File(tmp_path / "stained.h5", "r+") as file:
        for group in file.values():
            group["img"][0] = 255 - group["img"][0]
    places = f"--data {tmp_path / 'stained.h5'} --cache_dir {tmp_path / 'cache'} --output_dir {tmp_path / 'out'}"
    shown = shown_by("accept.py", "--adapter", str(adapter), *places.split())
    assert shown.startswith("recalibrate: the colors differ from those of training")
    found = json.loads((tmp_path / "out" / "acceptance.json").read_text())
    for estimate in (*found["predicted"].values(), found["evidence"]["predicted"]):
        assert 0 <= estimate["value"] <= 1 and estimate["low"] is None and estimate["high"] is None
    page = (tmp_path / "out" / "acceptance.html").read_text()
    assert page.count("withheld: the site differs") == 3
    assert "p = 0.0000" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data FEW", "--data FEW: 4 images, expected at least 10"),
        ("--data SITE --tolerance 1", "--tolerance is 1.0, expected at least 0 and below 1"),
        ("--data ALL --split other", "--data ALL: has the splits train, val, test, expected one"),
        ("--data SITE --reference SITE", "--reference SITE: these are the images of --data; give others"),
        ("--data SITE --labels HIDDEN", "--labels HIDDEN: no label is known"),
    ],
)
def test_what_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, shown_by: Callable[..., str], options: str, message: str
) -> None:
    adapter, site = trained
    write_data(tmp_path / "few", {"test": 4})
    write_challenge(tmp_path / "hidden", counts={"test": 4}, size=SIZE)
    places = {
        "FEW": tmp_path / "few" / "test.h5",
        "SITE": site,
        "ALL": write_data(tmp_path / "all"),
        "HIDDEN": tmp_path / "hidden" / "test.h5",
    }
    for name, place in places.items():
        options, message = (text.replace(name, str(place)) for text in (options, message))
    common = f"--adapter {adapter} --cache_dir {tmp_path / 'cache'} --output_dir {tmp_path / 'out'}"
    shown = shown_by("accept.py", *common.split(), *options.split())
    assert shown.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
