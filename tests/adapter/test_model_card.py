"""The model card and the report of an adapter folder."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from adapter_folders import logits
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_histo import hub
from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter import model_card
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import parse
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.evaluation.reporting import report
from hf_histo.result import Result
from hf_histo.transforms.augmentation import TestTimeViews
from hf_histo.transforms.mri import Preparation
from hf_histo.transforms.stain import CenterNormalizer, Statistics


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
    """The card has no code without this package for an adapter that needs more than its model and preprocessing."""
    sidecar = Sidecar.read(results["frozen"].adapter)
    assert "PeftModel" in model_card.card(sidecar, results["frozen"].record).text
    if "preparation" in change:
        change = {"preprocessing": dataclasses.replace(sidecar.preprocessing, **change)}
    text = model_card.card(dataclasses.replace(sidecar, **change), results["frozen"].record).text
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
    metrics = results["frozen"].record["splits"]
    assert card.data.model_name == "normal / tumor on data"
    recorded = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert recorded == {
        (split, kind): metrics[split]["overall"][name]["value"]
        for split in ("val", "test")
        for name, kind in (("accuracy", "accuracy"), ("auroc", "roc_auc"), ("f1", "f1"))
    }
    again = model_index_to_eval_results(eval_results_to_model_index(card.data.model_name, card.data.eval_results))
    assert again == (card.data.model_name, card.data.eval_results)


def test_the_card_states_what_was_measured(results: dict[str, Result]) -> None:
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
    assert "- test: no image is a byte copy of one in train, no group is also in train, centers" in text
    assert "not a medical device" in text
    shown = re.findall(r"!\[[^]]+\]\((.+?)\)", text)
    assert {"figures/training_curve.png", "figures/confusion_test.png", "figures/reliability_val.png"} <= set(shown)
    assert all((folder / name).is_file() for name in shown)
    options = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert options == metrics["options"]
    assert parse(None, [f"--{key}={value}" for key, value in options.items() if value is not None])


def test_the_recorded_options_make_the_same_run(results: dict[str, Result], source: tuple[Path, Path]) -> None:
    recorded = results["frozen"].record["options"]
    run = yaml.safe_load((results["frozen"].adapter.parent / "run.yaml").read_text(encoding="utf-8"))
    assert recorded == {key: value for key, value in run.items() if key in recorded}
    assert not {str(path) for path in source} & set(map(str, recorded.values()))
    assert "num_train_epochs" in recorded


@pytest.mark.parametrize("on_hub", [True, False])
def test_the_card_names_a_base_model_that_the_hub_has(results: dict[str, Result], on_hub: bool) -> None:
    sidecar = Sidecar.read(results["frozen"].adapter)
    if on_hub:
        sidecar = dataclasses.replace(
            sidecar, backbone=dataclasses.replace(sidecar.backbone, name="timm/resnet18.a1_in1k", revision="v1")
        )
    card = model_card.card(sidecar, results["frozen"].record)
    assert card.data.base_model == ("timm/resnet18.a1_in1k" if on_hub else None)
    if on_hub:
        assert "from_pretrained('timm/resnet18.a1_in1k', revision='v1', num_labels=1" in card.text
        assert "adaptation of `timm/resnet18.a1_in1k` at revision `v1`, trained" in card.text


def test_leaks_are_reported(results: dict[str, Result]) -> None:
    sidecar = Sidecar.read(results["frozen"].adapter)
    splits = sidecar.data.splits
    splits["test"] = dataclasses.replace(splits["test"], copies_of_train=3, groups_of_train=2, centers={})
    text = model_card.card(sidecar, results["frozen"].record).text
    assert (
        "- test: 3 of 7 images are byte copies of images in train, 2 of 4 groups are also in train, centers are "
        "unknown."
    ) in text


def test_any_name_of_a_class_is_shown_as_it_is(results: dict[str, Result], tmp_path: Path) -> None:
    """A class name with Markdown or HTML in it is shown as text by the card and the report."""
    unusual = ["<script>alert(1)</script>", "a|b *c* `d`\n# e \"'&"]
    folder = results["frozen"].adapter
    sidecar = dataclasses.replace(Sidecar.read(folder), label_names=unusual)
    for split, held in sidecar.data.splits.items():
        classes = dict(zip(unusual, held.classes.values(), strict=True))
        sidecar.data.splits[split] = dataclasses.replace(held, classes=classes)
    model, _ = hub.load(folder)
    metrics = {key: value for key, value in results["frozen"].record.items() if key != "calibration"}
    adapter_folder.save(tmp_path / "adapter", model, sidecar, metrics=metrics, tables={})

    page = Page.read(tmp_path / "adapter" / "report.html")
    assert "script" not in page.tags
    assert unusual[0] in page.text
    assert " ".join(unusual[1].split()) in " ".join(page.text.split())

    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.model_name == " / ".join(unusual) + " on data"
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
    addresses = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert len(list((folder / "figures").glob("*.png"))) == 7
    inside = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in addresses]
    assert inside == [(folder / "figures" / "worst_errors.png").read_bytes()]  # photographs; all others are drawings
    named = [value for name, value in page.attributes if name == "aria-label"]
    assert sorted(map(str, named)) == sorted(
        ["Training: loss, validation metric and learning rate", "ROC curves"]
        + [f"{figure} of {split}" for figure in ("Confusion matrix", "Reliability") for split in ("val", "test")]
    )
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    assert all((value or "").startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert not [value for name, value in page.attributes if name == "style" and "url(" in (value or "")]
    assert not any(name.startswith("on") for name, _ in page.attributes)
    style = (folder / "report.html").read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert ("name", "viewport") in page.attributes


def test_the_report_leads_with_data_and_results_and_folds_options_away(results: dict[str, Result]) -> None:
    whole = (results["frozen"].adapter / "report.html").read_text(encoding="utf-8")
    questions = ("on whom", "How good", "How it fails", "can be trusted", "Training", "Options", "<details>")
    places = [whole.index(question) for question in questions]
    assert places == sorted(places)
    before, folded = whole.split("<details>", 1)
    assert "<dt>target_modules</dt>" in before and "<dt>weight_decay</dt>" not in before  # a default
    assert folded.count("<dt>target_modules</dt>") == folded.count("<dt>weight_decay</dt>") == 1
    for caption in ("ROC curves", "Confusion matrix of val", "Reliability of test", "The worst errors of val"):
        assert whole.count(f"<figcaption>{caption}</figcaption>") == 1


def test_the_report_states_the_metrics_of_each_center(results: dict[str, Result]) -> None:
    text = Page.read(results["frozen"].adapter / "report.html").text
    for split in ("val", "test"):
        for row in report.center_rows(results["frozen"].record["splits"][split])[1:]:
            assert "".join(map(report.cell, row)) in text
    assert "learning_rate" in text
    assert "seconds" not in text
