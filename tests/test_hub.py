"""The adapter folder: what is in it, and that anybody gets the same logits from it."""

from __future__ import annotations

import ast
import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from miniature import config, write_backbone
from safetensors.torch import load_file, save_file

from hf_histo import hub
from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter import model_card
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import parse
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import report
from hf_histo.finetune import Result, fine_tune
from hf_histo.models import adapters, backbones
from hf_histo.training import trainer
from hf_histo.transforms.augmentation import TestTimeViews
from hf_histo.transforms.mri import Preparation
from hf_histo.transforms.stain import CenterNormalizer, Statistics

DESIGNED = {
    "adapter_config.json",
    "preprocessor_config.json",
    "adapter_model.safetensors",
    "hf_histo.json",
    "checksums.json",
    "README.md",
    "metrics.json",
    "report.html",
    "predictions/val.parquet",
    "predictions/test.parquet",
}
ROOT = Path(hub.__file__).parents[1]
QUICK = ["--target_modules=last-conv"]


@pytest.fixture(scope="module")
def results(source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """A finished run by its batch norm."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        mode: fine_tune(config(folder / mode, *source, *QUICK, f"--batch_norm={mode}"), load(source[1]))
        for mode in ("frozen", "track")
    }


@pytest.fixture
def adapter(results: dict[str, Result], tmp_path: Path) -> Path:
    """A copy to damage, as of a version before the checksums that would show it."""
    folder = shutil.copytree(results["frozen"].adapter, tmp_path / "adapter")
    (folder / "checksums.json").unlink()
    sidecar = json.loads((folder / "hf_histo.json").read_text(encoding="utf-8"))
    del sidecar["backbone"]["configuration"]
    (folder / "hf_histo.json").write_text(json.dumps(sidecar), encoding="utf-8")
    return folder


@pytest.fixture
def whole(results: dict[str, Result], tmp_path: Path) -> Path:
    """A copy with its checksums."""
    return shutil.copytree(results["frozen"].adapter, tmp_path / "whole")


def logits(folder: Path, split: str) -> np.ndarray:
    return Predictions.read(folder / "predictions" / f"{split}.parquet").logits


def test_the_folder_holds_what_is_designed(results: dict[str, Result]) -> None:
    for result in results.values():
        files = {str(path.relative_to(result.adapter)) for path in result.adapter.rglob("*") if path.is_file()}
        assert {name for name in files if not name.startswith("figures/")} == DESIGNED
        assert any(name.startswith("figures/") for name in files)
        assert all(name.endswith(".png") for name in files if name.startswith("figures/"))
        assert json.loads((result.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert not [path for path in result.adapter.parent.iterdir() if path.name.endswith(".incomplete")]


def test_a_new_process_gives_the_same_logits(
    results: dict[str, Result], source: tuple[Path, Path], tmp_path: Path
) -> None:
    code = (
        "import sys; from hf_histo.data.load import load; from hf_histo.inference import Classifier\n"
        "data, folder, *adapters = sys.argv[1:]\n"
        "for i, adapter in enumerate(adapters):\n"
        "    Classifier.from_pretrained(adapter).predict(load(data)['val']).to_parquet(f'{folder}/{i}.parquet')"
    )
    adapters = [str(result.adapter) for result in results.values()]
    subprocess.run([sys.executable, "-c", code, str(source[1]), str(tmp_path), *adapters], check=True)
    for i, result in enumerate(results.values()):
        saved = logits(result.adapter, "val")
        assert np.ptp(saved) > 1e-3
        found = pd.read_parquet(tmp_path / f"{i}.parquet")["logit"]
        np.testing.assert_allclose(found, saved, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["frozen", "track"])
def test_the_lines_of_the_card_give_the_same_logits(
    results: dict[str, Result], source: tuple[Path, Path], mode: str
) -> None:
    folder = results[mode].adapter
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    bare = next(block for block in blocks if "PeftModel" in block).replace("THIS_FOLDER", str(folder))
    images = ImageTable(load(source[1])["test"])
    batch = torch.stack([images[i]["image"] for i in range(len(images))])
    names: dict[str, Any] = {"pixel_values": Sidecar.read(folder).preprocessing(batch)}
    with torch.no_grad():
        exec(bare, names)
    np.testing.assert_allclose(names["logits"][:, 0].numpy(), logits(folder, "test"), rtol=0, atol=1e-5)


RGB = CenterNormalizer("rgb", Statistics((0.5,) * 3, ((0.1, 0, 0), (0, 0.1, 0), (0, 0, 0.1))), {}, ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"views": TestTimeViews(8)}, "the mean over 8 views"),
        ({"normalizer": RGB}, "normalization of each center's color (rgb)"),
        ({"adapt_batch_norm": True}, "batch-norm statistics of the images at hand"),
        ({"preparation": Preparation(gray=True, contrast="clahe")}, "the preparation of images (gray, contrast)"),
    ],
)
def test_the_card_has_no_lines_that_give_other_logits(
    results: dict[str, Result], change: dict[str, Any], reason: str
) -> None:
    """Without this package, that is, for an adapter that does more than its model and preprocessing."""
    sidecar = Sidecar.read(results["frozen"].adapter)
    assert "PeftModel" in model_card.card(sidecar, results["frozen"].metrics).text
    if "preparation" in change:
        change = {"preprocessing": dataclasses.replace(sidecar.preprocessing, **change)}
    text = model_card.card(dataclasses.replace(sidecar, **change), results["frozen"].metrics).text
    assert "PeftModel" not in text
    assert "pipeline(" not in text
    assert f"Needs this package: bare transformers and peft give other logits, without {reason}." in text
    assert "Classifier.from_pretrained" in text


def test_the_card_is_one_for_the_hub(results: dict[str, Result]) -> None:
    card = ModelCard.load(results["frozen"].adapter / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.license == "unknown"
    assert {"hf_histo", "lora"} <= set(card.data.tags)
    metrics = results["frozen"].metrics["splits"]
    assert card.data.model_name == "normal / tumor on data"
    told = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert told == {
        (split, kind): metrics[split]["overall"][name]["value"]
        for split in ("val", "test")
        for name, kind in (("accuracy", "accuracy"), ("auroc", "roc_auc"), ("f1", "f1"))
    }
    again = model_index_to_eval_results(eval_results_to_model_index(card.data.model_name, card.data.eval_results))
    assert again == (card.data.model_name, card.data.eval_results)


def test_the_card_tells_what_was_measured(results: dict[str, Result]) -> None:
    folder = results["frozen"].adapter
    text = (folder / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert report.table(report.center_rows(metrics["splits"]["test"])) in text
    assert report.table(report.size_rows(metrics)) in text
    cost = json.loads((folder.parent / "cost.json").read_text(encoding="utf-8"))
    assert cost["seconds"] > 0
    assert report.cost_sentence(cost) in text
    facts = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "images", "24", "13", "7", ""] in facts
    assert ["", "tumor", "12", "6", "3", ""] in facts
    assert "- test: no image is byte for byte one of train, no group is also in train, centers" in text
    assert "not a medical device" in text
    shown = re.findall(r"!\[[^]]+\]\((.+?)\)", text)
    assert {"figures/training_curve.png", "figures/confusion_test.png", "figures/reliability_val.png"} <= set(shown)
    assert all((folder / name).is_file() for name in shown)
    options = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert options == metrics["options"]
    assert parse(None, [f"--{key}={value}" for key, value in options.items() if value is not None])


def test_the_options_that_are_told_make_the_same_run(results: dict[str, Result], source: tuple[Path, Path]) -> None:
    told = results["frozen"].metrics["options"]
    run = yaml.safe_load((results["frozen"].adapter.parent / "run.yaml").read_text(encoding="utf-8"))
    assert told == {key: value for key, value in run.items() if key in told}
    assert not {str(path) for path in source} & set(map(str, told.values()))
    assert "num_train_epochs" in told


@pytest.mark.parametrize("on_hub", [True, False])
def test_the_card_names_a_base_model_that_the_hub_has(results: dict[str, Result], on_hub: bool) -> None:
    sidecar = Sidecar.read(results["frozen"].adapter)
    if on_hub:
        sidecar = dataclasses.replace(
            sidecar, backbone=dataclasses.replace(sidecar.backbone, name="timm/resnet18.a1_in1k")
        )
    card = model_card.card(sidecar, results["frozen"].metrics)
    assert card.data.base_model == ("timm/resnet18.a1_in1k" if on_hub else None)
    if on_hub:
        assert "from_pretrained('timm/resnet18.a1_in1k', num_labels=1" in card.text


def test_leaks_are_told(results: dict[str, Result]) -> None:
    sidecar = Sidecar.read(results["frozen"].adapter)
    splits = sidecar.data.splits
    splits["test"] = dataclasses.replace(splits["test"], copies_of_train=3, groups_of_train=2, centers={})
    text = model_card.card(sidecar, results["frozen"].metrics).text
    assert (
        "- test: 3 of 7 images are byte for byte also in train, 2 of 4 groups are also in train, centers are unknown."
    ) in text


def test_any_name_of_a_class_is_shown_as_it_is(results: dict[str, Result], tmp_path: Path) -> None:
    """In the card as Markdown and in the report as HTML, and not as what it would mean there."""
    strange = ["<script>alert(1)</script>", "a|b *c* `d`\n# e \"'&"]
    folder = results["frozen"].adapter
    sidecar = dataclasses.replace(Sidecar.read(folder), label_names=strange)
    for split, held in sidecar.data.splits.items():
        classes = dict(zip(strange, held.classes.values(), strict=True))
        sidecar.data.splits[split] = dataclasses.replace(held, classes=classes)
    model, _ = hub.load(folder)
    adapter_folder.save(tmp_path / "adapter", model, sidecar, metrics=results["frozen"].metrics, tables={})

    page = Page.read(tmp_path / "adapter" / "report.html")
    assert "script" not in page.tags
    assert strange[0] in page.text
    assert " ".join(strange[1].split()) in " ".join(page.text.split())

    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.model_name == " / ".join(strange) + " on data"
    assert "<script>" not in card.text
    header, rule = next(pair for pair in pairwise(card.text.splitlines()) if pair[0].startswith("|"))
    assert len(re.findall(r"(?<!\\)\|", header)) == rule.count("|")


class Page(HTMLParser):
    """The tags, the attributes and the visible text of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data

    @classmethod
    def read(cls, path: Path) -> Page:
        page = cls()
        page.feed(path.read_text(encoding="utf-8"))
        return page


def test_the_report_holds_all_that_it_shows(results: dict[str, Result]) -> None:
    folder = results["frozen"].adapter
    page = Page.read(folder / "report.html")
    assert not page.tags & {"script", "link", "iframe", "object", "a"}
    addresses = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset", "style")]
    assert len(addresses) == len(list((folder / "figures").glob("*.png"))) == 7
    inside = {base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in addresses}
    assert inside == {path.read_bytes() for path in (folder / "figures").iterdir()}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    style = (folder / "report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert ("name", "viewport") in page.attributes


def test_the_report_tells_the_metrics_of_each_center(results: dict[str, Result]) -> None:
    text = Page.read(results["frozen"].adapter / "report.html").text
    for split in ("val", "test"):
        for row in report.center_rows(results["frozen"].metrics["splits"][split])[1:]:
            assert "".join(map(report.cell, row)) in text
    assert "learning_rate" in text
    assert "seconds" not in text


def test_a_finished_run_is_not_trained_again(
    results: dict[str, Result], source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "build", lambda *args, **kwargs: pytest.fail("trained again"))
    folder = results["frozen"].adapter.parent
    again = fine_tune(config(folder, *source, *QUICK, "--batch_norm=frozen"), load(source[1]))
    assert again.seconds is None
    assert again.metrics == results["frozen"].metrics
    assert "nothing was trained" in again.summary()


def test_the_same_command_gives_the_same_bytes(
    results: dict[str, Result], source: tuple[Path, Path], tmp_path: Path
) -> None:
    again = fine_tune(config(tmp_path / "again", *source, *QUICK), load(source[1]))
    for path in results["frozen"].adapter.rglob("*.*"):
        name = path.relative_to(results["frozen"].adapter)
        if name.name != "README.md":  # it tells the seconds
            assert (again.adapter / name).read_bytes() == path.read_bytes(), name


def refusal(folder: Path, **options: str) -> str:
    with pytest.raises(HistoError) as caught:
        hub.load(folder, **options)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '"text"', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_a_sidecar_that_is_none(adapter: Path, content: str) -> None:
    (adapter / "hf_histo.json").write_text(content, encoding="utf-8")
    assert "hf_histo.json" in refusal(adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "magic"),
        ("batch_norm", None),
        ("label_names", "normal"),
        ("label_names", ["one"]),
        ("label_names", [0, 1]),
        ("label_names", ["tumor", "tumor"]),
        ("adapt_batch_norm", "no"),
        ("adapt_batch_norm", 0),
        ("bare", "yes"),
        ("thresholds", {"validation": "0.5"}),
        ("thresholds", {"validation": True}),
        ("threshold", "0.5"),
        ("versions", {"torch": 2}),
        ("head", {"widths": [8.0]}),
        ("head", {"widths": [], "softmax": "no"}),
        ("head", {"widths": [], "more": 1}),
        ("colors", {"centers": {}, "limit": 1}),
        ("normalizer", {"method": "rgb", "reference": [["0", "0", "0"], [1, 0, 0], [0, 1, 0], [0, 0, 1]]}),
        ("normalizer", {"method": "rgb", "reference": [[True, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]}),
        ("views", {"count": 10**9, "augmentation": "flips"}),
        ("views", {"count": 65, "augmentation": "flips"}),
        ("views", {"count": True}),
        ("views", True),
        ("views", {"count": 8, "more": 1}),
        ("num_outputs", 7),
        ("num_outputs", "1"),
        ("backbone", "resnet50"),
        ("backbone", {"name": "resnet50"}),
        ("threshold", 1.5),
        ("threshold", float("nan")),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("preprocessing", None),
        ("preprocessing", {"image_size": 32}),
        ("views", 3),
        ("views", {"count": 8, "augmentation": "magic"}),
        ("views", {"count": 8, "augmentation": []}),
        ("views", {"seed": "0"}),
        ("unknown", 1),
    ],
)
def test_a_sidecar_with_a_strange_value(adapter: Path, key: str, value: object) -> None:
    file = adapter / "hf_histo.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}), encoding="utf-8")
    assert "hf_histo.json" in refusal(adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_size", "32"), ("image_size", -1), ("image_size", 0), ("image_size", 4096), ("resize_size", 10**5),
     ("image_size", True), ("image_size", 32.0), ("mean", ["0.5"] * 3), ("mean", [float("inf")] * 3),
     ("preparation", {"crop_to_brain": "no"}), ("preparation", {"gray": 1}), ("gray_bits", 12.5), ("unknown", 1),
     ("resize_size", 8), ("interpolation", "magic"), ("std", [0, 1, 1]),
     ("mean", [0.5]), ("fit", "magic"), ("preparation", {"contrast": "magic"}), ("preparation", {"unknown": True})],
)  # fmt: skip
def test_a_sidecar_with_a_strange_preprocessing(adapter: Path, key: str, value: object) -> None:
    file = adapter / "hf_histo.json"
    content = json.loads(file.read_text())
    content["preprocessing"][key] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    message = refusal(adapter)
    assert "hf_histo.json: preprocessing" in message


def test_a_sidecar_older_than_an_option(adapter: Path) -> None:
    file = adapter / "hf_histo.json"
    content = json.loads(file.read_text())
    assert content["views"] == {"count": 1, "augmentation": "square", "seed": 0}
    newer = Sidecar.read(adapter)
    content["views"] = 8
    del content["preprocessing"]["fit"], content["preprocessing"]["preparation"], content["adapt_batch_norm"]
    del content["data"]["description"], content["data"]["near_copies_searched"]
    file.write_text(json.dumps(content), encoding="utf-8")
    sidecar = Sidecar.read(adapter)
    assert sidecar.preprocessing == newer.preprocessing
    assert sidecar.views == TestTimeViews(8)
    assert not sidecar.adapt_batch_norm
    assert sidecar.data == dataclasses.replace(newer.data, description=None)
    content["data"]["counts"] = {split: held["images"] for split, held in content["data"].pop("splits").items()}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert Sidecar.read(adapter).data.splits == {}


def test_a_sidecar_is_written_as_it_was_read(whole: Path, tmp_path: Path) -> None:
    Sidecar.read(whole).write(tmp_path)
    assert (tmp_path / "hf_histo.json").read_bytes() == (whole / "hf_histo.json").read_bytes()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backbone.name", ""),
        ("backbone.name", "../elsewhere"),
        ("backbone.revision", 1),
        ("backbone.fingerprint", None),
        ("backbone.configuration", []),
        ("backbone.more", 1),
        ("data.name", None),
        ("data.description", 1),
        ("data.near_copies_searched", "no"),
        ("data.more", 1),
        ("data.splits.test.images", -1),
        ("data.splits.test.images", "7"),
        ("data.splits.test.classes.tumor", 1.5),
        ("data.splits.test.more", 1),
        ("normalizer.method", "magic"),
        ("normalizer.reference", [[0, 0, 0], [1, 0, 0], [0, 1, 0]]),
        ("normalizer.reference", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]),
        ("normalizer.0", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1e7]]),
        ("normalizer.one", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_a_part_of_a_sidecar_with_an_invalid_value(adapter: Path, path: str, value: object) -> None:
    """The error names the part."""
    file = adapter / "hf_histo.json"
    content = json.loads(file.read_text())
    identity = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    content["normalizer"] = {"method": "rgb", "reference": identity, "0": identity}
    part = content
    *parents, key = path.split(".")
    for parent in parents:
        part = part[parent]
    part[key] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    assert f"hf_histo.json: {path.split('.')[0]}" in refusal(adapter)


def test_a_sidecar_of_a_thousand_brackets(adapter: Path) -> None:
    (adapter / "hf_histo.json").write_text("[" * 200_000, encoding="utf-8")
    assert "nested too deeply" in refusal(adapter)


@pytest.mark.parametrize(
    "change",
    [
        {"head": {"widths": [10**9, 10**9]}},
        {"head": {"widths": [512] * 10_000}},
        {"backbone": {"name": "../../etc", "revision": None, "fingerprint": ""}},
        {"backbone": {"name": "owner/../../x", "revision": None, "fingerprint": ""}},
        {"preprocessing": {"image_size": 10**9, "resize_size": 10**9, "interpolation": "bilinear",
                           "mean": [0, 0, 0], "std": [1, 1, 1]}},
    ],
)  # fmt: skip
def test_a_sidecar_that_asks_for_the_moon(adapter: Path, change: dict[str, Any]) -> None:
    file = adapter / "hf_histo.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    assert "hf_histo.json" in refusal(adapter)


@pytest.mark.parametrize(
    "change",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
        {"layer_replication": [[0, 10**6]]},
        {"rank_pattern": {".*": 10**9}},
        {"peft_type": "XLORA"},
        {"bias": "all"},
        {"r": 10**9},
        {"r": "8"},
        {"lora_alpha": "much"},
    ],
)
def test_an_adapter_config_that_asks_for_more_than_lora(adapter: Path, change: dict[str, Any]) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    assert "can't be put on" in refusal(adapter)


def test_no_regex_of_an_adapter_is_run(adapter: Path, results: dict[str, Result]) -> None:
    file = adapter / "adapter_config.json"
    endless = {"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*!", "modules_to_save": ["timm_model"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | endless), encoding="utf-8")
    folders = adapter, results["frozen"].adapter
    changed, original = (adapters.weights(hub.load(folder)[0], batch_norm="frozen") for folder in folders)
    assert changed.keys() == original.keys()
    assert all(torch.equal(changed[key], original[key]) for key in original)


@pytest.mark.parametrize("name", ["base_model.model.(.*)*(.*)*(.*)*(.*)*(.*)*!.weight", "(", "a" * 1000])
def test_no_name_of_a_weight_is_run_as_a_regex(adapter: Path, name: str) -> None:
    """transformers takes them for regexes."""
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights | {name: torch.ones(2)}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "a weight is called" in refusal(adapter)


class Bomb:
    """What unpickling it would run."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def test_a_pickle_is_never_opened(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pt", "training_args.bin"):
        torch.save(Bomb(tmp_path / "witness"), adapter / name)
    assert "adapter_model.safetensors" in refusal(adapter)
    torch.save(Bomb(tmp_path / "witness"), adapter / "adapter_model.safetensors")
    assert "can't be put on" in refusal(adapter)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("fault", ["shape", "nan", "missing", "unknown", "rank"])
def test_weights_that_do_not_fit(adapter: Path, fault: str) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(key for key in weights if "lora_B" in key)
    if fault == "shape":
        weights[key] = weights[key][:1].clone()
    if fault == "nan":
        weights[key] = weights[key] / 0
    if fault == "missing":
        del weights[key]
    if fault == "unknown":
        weights["base_model.model.other.weight"] = torch.ones(2)
    if fault == "rank":
        weights = {k: v[:1].clone() if "lora_A" in k else v for k, v in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    refusal(adapter)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}},
        {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "unheard_of"},
        {"architecture": "local-dir:../elsewhere"},
        {"model_args": {"checkpoint_path": "../elsewhere/weights.pth"}},
        {"_attn_implementation": "nobody/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"model_args": {"layers": [10**9] * 4}},
        {"model_args": {"stem_width": 10**6}},
        {"model_args": "text"},
        {"pretrained_cfg": {"input_size": [3, 10**9, 10**9], "mean": [0, 0, 0], "std": [1, 1, 1]}},
    ],
)
def test_a_backbone_made_to_do_harm(
    source: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(source[0], tmp_path / "backbone")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')\n")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    with pytest.raises(HistoError) as caught:
        backbones.load(str(folder), 1)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "witness").exists()


def test_nothing_is_unpickled_and_no_remote_code_trusted() -> None:
    files = [path for name in ("hf_histo", "recipes") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 50
    never = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "eval", "exec"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in never, (path, node.lineno)
                trusted = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
                assert not any(ast.unparse(value) != "False" for value in trusted), (path, node.lineno)


def test_a_folder_of_no_run_and_a_name_without_a_network(tmp_path: Path) -> None:
    assert "hf_histo.json" in refusal(tmp_path)
    assert "give a folder that exists, or owner/name" in refusal(tmp_path / "missing" / "adapter")
    for name in ("nobody/nothing", "./missing/folder", ""):
        with pytest.raises(HistoError, match=r"no such folder|holds no hf_histo\.json"):
            hub.load(name)


def test_a_backbone_with_other_weights_is_refused(adapter: Path, tmp_path: Path, source: tuple[Path, Path]) -> None:
    other = write_backbone(tmp_path / "other", seed=1)
    message = refusal(adapter, backbone=str(other))
    assert "other weights" in message
    assert "--backbone" in message
    moved = shutil.copytree(source[0], tmp_path / "moved")
    hub.load(adapter, backbone=str(moved))


def test_a_changed_bit_is_found_in_every_file_but_the_card(whole: Path) -> None:
    files = [path for path in whole.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        for place in np.linspace(0, len(content) - 1, 5).astype(int):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert path.name in refusal(whole)
        path.write_bytes(content)
    hub.load(whole)


def test_the_card_may_be_edited_and_what_shows_images_removed(whole: Path) -> None:
    (whole / "README.md").write_text("Mine.", encoding="utf-8")
    (whole / "notes.txt").write_text("Mine.", encoding="utf-8")
    for name in ("predictions", "figures"):
        shutil.rmtree(whole / name)
    hub.load(whole)


def test_files_of_two_runs_in_a_folder_are_refused(whole: Path, results: dict[str, Result]) -> None:
    other = results["track"].adapter
    for name in ("adapter_model.safetensors", "hf_histo.json"):
        content = (whole / name).read_bytes()
        shutil.copy(other / name, whole / name)
        assert name in refusal(whole)
        (whole / name).write_bytes(content)
    shutil.copy(other / "predictions" / "val.parquet", whole / "predictions" / "other.parquet")
    assert "other.parquet" in refusal(whole)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "hf_histo.json"])
def test_a_folder_without_what_a_prediction_needs_is_refused(whole: Path, name: str) -> None:
    (whole / name).unlink()
    with pytest.raises(HistoError, match=f"holds no {name}"):
        adapter_folder.verify(whole)
    assert name in refusal(whole)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {"hf_histo.json": 1}}'])
def test_a_list_of_checksums_that_is_damaged(whole: Path, content: str) -> None:
    (whole / "checksums.json").write_text(content, encoding="utf-8")
    refusal(whole)


def test_a_folder_older_than_its_checksums_is_loaded(adapter: Path, whole: Path) -> None:
    old, new = (adapters.weights(hub.load(folder)[0], batch_norm="frozen") for folder in (adapter, whole))
    assert all(torch.equal(old[key], new[key]) for key in new)


def test_no_file_outside_the_folder_is_read(whole: Path, tmp_path: Path) -> None:
    """Neither by a link nor by a name among the checksums; and nothing that is no file."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name in ("hf_histo.json", "adapter_model.safetensors", "README.md"):
        content = (whole / name).read_bytes()
        (whole / name).unlink()
        (whole / name).symlink_to(secret)
        assert "outside" in refusal(whole)
        (whole / name).unlink()
        os.mkfifo(whole / name)
        assert "regular file" in refusal(whole)
        (whole / name).unlink()
        (whole / name).write_bytes(content)
    listed = json.loads((whole / "checksums.json").read_text(encoding="utf-8"))
    listed["files"]["../secret"] = "0" * 32
    (whole / "checksums.json").write_text(json.dumps(listed), encoding="utf-8")
    hub.load(whole)


@pytest.mark.parametrize("change", [{"model_args": {"act_layer": "gelu"}}, {"do_pooling": False}])
def test_a_backbone_with_another_configuration_is_refused(
    whole: Path, source: tuple[Path, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    moved = shutil.copytree(source[0], tmp_path / "moved")
    file = moved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change), encoding="utf-8")
    message = refusal(whole, backbone=str(moved))
    assert next(iter(change)) in message
    assert str(moved) in message


@pytest.mark.parametrize(("module", "part"), [(model_card, "card"), (adapter_folder, "write_json")])
def test_a_save_that_fails_leaves_the_old_folder(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Result], module: ModuleType, part: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    model, sidecar = hub.load(adapter)
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    monkeypatch.setattr(module, part, fail)
    with pytest.raises(OSError, match="disk full"):
        adapter_folder.save(adapter, model, sidecar, metrics=results["frozen"].metrics, tables={})
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_a_save_replaces_an_older_folder(adapter: Path, results: dict[str, Result]) -> None:
    (adapter / "old.txt").touch()
    model, sidecar = hub.load(adapter)
    adapter_folder.save(adapter, model, sidecar, metrics=results["frozen"].metrics, tables={})
    assert not (adapter / "old.txt").exists()
    assert hub.load(adapter)[1] == sidecar


def test_a_refused_upload_is_one_line(adapter: Path) -> None:
    with pytest.raises(HistoError) as caught:
        hub.push(adapter, "nobody/nothing")
    assert str(caught.value).startswith("--hub_model_id nobody/nothing: ")
    assert "\n" not in str(caught.value)


def test_an_adapter_that_lost_its_checksums_is_refused(results: dict[str, Result], tmp_path: Path) -> None:
    folder = shutil.copytree(results["frozen"].adapter, tmp_path / "adapter")
    (folder / "checksums.json").unlink()
    with pytest.raises(HistoError, match=r"holds no checksums\.json, expected it beside hf_histo\.json"):
        adapter_folder.verify(folder)
