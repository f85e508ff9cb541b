"""Cytology recipes: few labels, resumption of a grid, initialization by an adapter, and levels of a hierarchy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from recipe_mains import RECIPES, main_of
from safetensors.torch import load_file

import hf_histo.evaluation.forward
from hf_histo.config import parse
from hf_histo.errors import HistoError

QUICK = "--image_size=32 --resize_size=32 --per_device_train_batch_size=8 --learning_rate=0.01 --augmentation=flips"
CONFIG = str(RECIPES / "configs" / "cytology_lora.yaml")
Call = Callable[..., None]

COLORS = {"ASC > ASC-H": (200, 40, 40), "ASC > ASC-US": (200, 120, 40), "Normal > Basal": (40, 80, 200)}


def write_cells(folder: Path, count: int = 6) -> Path:
    """HiCervix in miniature: noisy images whose color reveals the class."""
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        rows = ["image_name,level_1,level_2,level_3"]
        (folder / split).mkdir(parents=True)
        for name, color in COLORS.items():
            for i in range(count):
                file = f"{name.split(' > ')[1]}-{i}.png"
                pixels = np.clip(np.array(color) + random.normal(0, 15, (32, 32, 3)), 0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(folder / split / file)
                rows.append(f"{file},{name.replace(' > ', ',')},")
        (folder / f"{split}.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cells(tmp_path_factory.mktemp("data") / "cells")


@pytest.fixture
def call(backbone: Path, cells: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a recipe's main in this process, on the cells by default."""

    def call(recipe: str, *arguments: str) -> None:
        main = main_of(recipe)
        own = [f"--backbone={backbone}", f"--data={cells}", *QUICK.split(), *arguments]
        monkeypatch.setattr(sys, "argv", [recipe, *own])
        main()

    return call


def test_a_handful_of_labels(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--iterations_per_shot=3", "--warmup_steps=2", "--eval_steps=0.5"]
    call("cytology_lora.py", f"--output_dir={tmp_path / 'a'}", "--shots=2", *steps)
    state = json.loads(next((tmp_path / "a").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["max_steps"] == 8
    assert state["eval_steps"] == 4
    sidecar = json.loads((tmp_path / "a" / "adapter" / "hf_histo.json").read_text())
    images = {split: held["images"] for split, held in sidecar["data"]["splits"].items()}
    assert images == {"train": 6, "val": 6, "test": 18}
    assert sidecar["label_names"] == list(COLORS)
    printed = capsys.readouterr().out
    assert "accuracy by level" in printed
    assert "along the path" in printed
    by_level = json.loads((tmp_path / "a" / "adapter" / "metrics.json").read_text())["levels"]["test"]
    assert by_level["levels"]["1"]["classes"] == 2
    assert by_level["mean"]["top_down"] <= by_level["levels"]["1"]["top_down"]

    call("cytology_lora.py", f"--output_dir={tmp_path / 'b'}", "--level=1", "--percentage=50", "--num_train_epochs=1")
    sidecar = json.loads((tmp_path / "b" / "adapter" / "hf_histo.json").read_text())
    assert sidecar["label_names"] == ["ASC", "Normal"]
    assert sidecar["data"]["splits"]["train"]["images"] == 9


def test_a_grid_resumes_and_compares_the_same_images(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text("method: lora\nlora_rank: 2\nmax_steps: 4\neval_steps: 2\n")
    grid = ["--methods", "prototype", "knn", "linear", str(tmp_path / "tiny.yaml"), "--shot_counts", "1", "all"]
    out = tmp_path / "out"
    call("few_shot.py", *grid, "--seeds=1", f"--output_dir={out}")
    found = json.loads((out / "few_shot.json").read_text())["cells"]
    assert len(found) == 4 * 2
    assert {cell["shots"] for cell in found} == {0, 1}
    assert all(cell["levels"]["levels"].keys() == {"1", "2"} for cell in found)
    by_method = {Path(cell["method"]).stem: cell["trainable"] for cell in found}
    assert by_method["prototype"] == by_method["knn"] == 0 < by_method["linear"] < by_method["tiny"]
    full = [cell for cell in found if cell["shots"] == 0 and cell["method"] == "linear"]
    assert min(cell["accuracy"] for cell in full) > 0.8  # color reveals the class
    text = (out / "few_shot.md").read_text()
    assert "| model    | prototype |" in text
    assert text in capsys.readouterr().out
    with PIL.Image.open(out / "few_shot-cells.png") as figure:
        assert figure.size == (1200, 750)

    # Again: the backbone is not run, and nothing is trained.
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("hf_histo.evaluation.figures.embedding.features", refuse)
    monkeypatch.setattr("transformers.Trainer.train", refuse)
    call("few_shot.py", *grid, "--seeds=1", f"--output_dir={out}")
    assert json.loads((out / "few_shot.json").read_text())["cells"] == found


@pytest.mark.parametrize("normalization", ["none", "rgb"])
def test_probes_and_training_see_the_same_images(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalization: str
) -> None:
    """The backbone gets the same input for `test` from the probes' features and from the prediction of an adapter."""
    seen: dict[str, list[torch.Tensor]] = {"Features of test": [], "Predicting test": []}
    forward = hf_histo.evaluation.forward.forward

    def watched(model: torch.nn.Module, *args: Any, description: str, **kwargs: Any) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, named: dict[str, torch.Tensor]) -> None:
            if len(named["pixel_values"]) > 1:  # not the sample that a merged model is compared on
                seen.setdefault(description, []).append(named["pixel_values"].clone())

        hook = model.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            return forward(model, *args, description=description, **kwargs)
        finally:
            hook.remove()

    for module in ("hf_histo.evaluation.figures.embedding", "hf_histo.inference"):
        monkeypatch.setattr(f"{module}.forward", watched)
    (tmp_path / "tiny.yaml").write_text("method: lora\nlora_rank: 2\nmax_steps: 1\n")
    methods = ["--methods", "prototype", str(tmp_path / "tiny.yaml"), "--shot_counts", "3", "--seeds=1"]
    changes = ["--gray", "--crop_to_brain", "--contrast=stretch", f"--normalization={normalization}"]
    call("few_shot.py", *methods, *changes, "--test_time_views=8", f"--output_dir={tmp_path / 'out'}")
    probes, training = (torch.cat(seen[name]) for name in ("Features of test", "Predicting test"))
    assert len(probes) == 8 * 18
    assert torch.equal(probes, training)
    assert torch.equal(probes[:, 0], probes[:, 1])  # gray


def test_a_grid_marks_what_used_the_unlabeled_test_images(
    call: Call, source: tuple[Path, Path], tmp_path: Path
) -> None:
    """The color of a test center that training did not see is measured on its images."""
    (tmp_path / "tiny.yaml").write_text("method: lora\nlora_rank: 2\nmax_steps: 1\n")
    for normalization, expected in (("none", []), ("rgb", ["color statistics"])):
        out = tmp_path / normalization
        methods = ["--methods", "prototype", str(tmp_path / "tiny.yaml"), "--shot_counts", "all", "--seeds=1"]
        call("few_shot.py", f"--data={source[1]}", *methods, f"--normalization={normalization}", f"--output_dir={out}")
        cells = json.loads((out / "few_shot.json").read_text())["cells"]
        assert [cell["transductive"] for cell in cells] == [expected, expected]
        text = (out / "few_shot.md").read_text()
        assert ("prototype (transductive)" in text and "tiny (transductive)" in text) == bool(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--methods", "knn", "--shots=3"], "--shots is 3, which can't act here: --shot_counts draws the images"),
        (["--methods", "boosting"], "--methods boosting: no such file, and none of prototype, knn, linear"),
        (["--methods", "knn", "--shot_counts", "few"], "--shot_counts is few, expected numbers or 'all'"),
        (["--methods", "knn", CONFIG, "--shot_counts", "7"], "train: ASC > ASC-H has 6 images, expected at least 7"),
        (["--methods", "knn", "--config=x.yaml"], "--config is one config, expected the option that takes several"),
        (["--methods", "knn", "--seeds=0"], "--seeds and --shot_counts must be at least 1"),
        (["--methods", "knn", "--shot_counts", "0", "1"], "--seeds and --shot_counts must be at least 1"),
    ],
)
def test_a_grid_that_can_not_be(arguments: list[str], expected: str, call: Call, tmp_path: Path) -> None:
    with pytest.raises(HistoError) as caught:
        call("few_shot.py", *arguments, f"--output_dir={tmp_path / 'out'}")
    assert expected in str(caught.value)


def test_an_adapter_of_another_data_set_to_start_from(call: Call, tmp_path: Path) -> None:
    lora = ["--lora_rank=2", "--target_modules=last-conv"]
    call("cytology_lora.py", f"--output_dir={tmp_path / 'first'}", "--level=1", "--num_train_epochs=1", *lora)
    first = tmp_path / "first" / "adapter"
    # Nothing is learned in the second run, so that what it saves is what it started from.
    still = [f"--init_adapter={first}", "--num_train_epochs=1", "--learning_rate=1e-30", "--weight_decay=0"]
    call("cytology_lora.py", f"--output_dir={tmp_path / 'second'}", *still, *lora)
    one, other = (
        load_file(folder / "adapter_model.safetensors") for folder in (first, tmp_path / "second" / "adapter")
    )
    matrices = {key for key in other if ".lora_" in key}
    assert matrices
    assert all(torch.allclose(one[key], other[key]) for key in matrices)
    assert any(other[key].abs().max() > 0 for key in matrices if "lora_B" in key)
    assert {key: value.shape for key, value in one.items()} != {key: value.shape for key, value in other.items()}

    for changed, expected in (
        (["--lora_rank=4", "--target_modules=last-conv"], "LoRA matrices differ from those to be trained"),
        (["--lora_rank=2", "--target_modules=all-conv"], "LoRA matrices differ from those to be trained"),
        ([*lora, "--lora_alpha=3"], "its lora_alpha is 16.0, here 3.0"),
        ([*lora, "--method=linear"], "which acts only with --method lora"),
        ([*lora, "--backbone=builtin"], "is for the backbone"),
    ):
        with pytest.raises(HistoError) as caught:
            call("cytology_lora.py", f"--output_dir={tmp_path / 'no'}", *still, *changed, "--overwrite_output_dir")
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    "name", ["cytology_lora", "cytology_linear", "cytology_text", "cytology_hicervix", "cytology_full"]
)
def test_the_studys_settings(name: str) -> None:
    config = parse(None, ["--config", str(RECIPES / "configs" / f"{name}.yaml")])
    assert config.training.optimizer == "adamw"
    assert config.training.weight_decay == 0.01
    assert config.training.per_device_train_batch_size == 32
    assert config.training.warmup_steps == 50
    assert config.augmentation.augmentation == "resized-crop"
    if config.adapter.method == "lora":
        assert (config.adapter.lora_alpha, config.adapter.use_rslora, config.adapter.lora_dropout) == (1, True, 0.25)
        assert config.adapter.lora_rank == {"cytology_lora": 2, "cytology_hicervix": 16}[name]
