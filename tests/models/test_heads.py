"""Heads of more than one linear layer: size, trained parameters, and restoration with the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import config, write_backbone, write_data
from recipe_mains import RECIPES
from torch import nn
from transformers import PreTrainedModel

from hf_histo import hub
from hf_histo.config import AdapterOptions, ModelOptions, parse
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.finetune import run_config
from hf_histo.inference import Classifier
from hf_histo.models import adapters, backbones, heads

CONFIGS = RECIPES / "configs"
DESIGNS = {
    "mlp": "--head=mlp --head_widths=5,4",
    "linear on logits": "--head_on=logits",
    "mlp on trained logits": "--head=mlp --head_widths=6 --head_on=logits --train_output_layer",
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with an output layer of ten classes."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "model")


def build(backbone: Path, options: str, outputs: int = 3) -> PreTrainedModel:
    design = heads.HeadConfig.of(parse(None, options.split()).model)
    return backbones.load(str(backbone), outputs, head=design)


# The numbers are those of the article's table. With random weights: sizes only.
@pytest.mark.parametrize(("case", "expected"), [(1, 646_410), (2, 2_733_810), (3, 2_097_410), (4, 20_490)])
def test_trainable_parameters_of_the_published_cases(case: int, expected: int) -> None:
    options = parse(None, ["--config", str(CONFIGS / f"digits_case{case}.yaml"), "--random_weights"])
    with torch.device("meta"):
        model = backbones.load(options.model.backbone, 10, random_weights=True, head=heads.HeadConfig.of(options.model))
        adapted = adapters.add(model, options.adapter)
    assert adapters.parameter_counts(adapted)["trainable"] == expected


@pytest.mark.parametrize("options", DESIGNS.values(), ids=DESIGNS)
def test_the_output_layer_is_kept_below_a_head_on_logits(backbone: Path, options: str) -> None:
    own = backbones.load(str(backbone), 10, keep_head=True).eval()
    model = build(backbone, options).eval()
    pixels = torch.randn(2, 3, 32, 32)
    seen: list[torch.Tensor] = []
    head = model.get_submodule(heads.name_of(model))
    head.get_submodule("layers").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert model(pixel_values=pixels).logits.shape == (2, 3)
        if "logits" in options:
            torch.testing.assert_close(seen[0], own(pixel_values=pixels).logits)
        else:
            assert seen[0].shape == (2, own.get_submodule(heads.name_of(own)).in_features)


@pytest.mark.parametrize("options", DESIGNS.values(), ids=DESIGNS)
def test_only_what_should_move_moves(backbone: Path, options: str) -> None:
    model = build(backbone, options)
    adapted = adapters.add(model, AdapterOptions(target_modules="last-conv", lora_rank=2))
    before = {name: tensor.clone() for name, tensor in adapted.named_parameters()}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # B of LoRA is zero at first, and only then A gets a gradient
        logits = adapted.eval()(pixel_values=torch.randn(4, 3, 32, 32)).logits
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 1])).backward()
        optimizer.step()
    moved = {name for name, tensor in adapted.named_parameters() if not torch.equal(tensor, before[name])}
    expected = {name for name in before if "lora_" in name or ".modules_to_save." in name}
    assert moved == expected
    assert any(".output.modules_to_save." in name for name in moved) == ("--train_output_layer" in options)
    assert all("lora_" not in name for name in before if heads.name_of(model) in name)


@pytest.mark.parametrize("options", DESIGNS.values(), ids=DESIGNS)
def test_a_head_comes_back_with_its_adapter(backbone: Path, tmp_path: Path, options: str) -> None:
    data = load(write_data(tmp_path / "data"))
    more = [*options.split(), "--target_modules=last-conv", "--num_train_epochs=1", "--head_dropout=0.2"]
    result = run_config(config(tmp_path / "run", backbone, tmp_path / "data", *more), data)
    saved = Predictions.read(result.adapter / "predictions" / "test.parquet")["logit"]
    found = Classifier.from_pretrained(result.adapter).predict(data["test"])["logit"]
    assert np.ptp(saved) > 0
    np.testing.assert_allclose(found, saved, rtol=0, atol=1e-5)
    card = (result.adapter / "README.md").read_text(encoding="utf-8")
    assert "bare transformers" not in card
    assert ("hidden layers of" in card) == ("mlp" in options)
    assert ("trained as well" in card) == ("--train_output_layer" in options)

    file = result.adapter / "hf_histo.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for invalid in ({"on": "air"}, {"widths": [0]}, {"widths": 3}, {"depth": 2}):
        broken = content | {"head": content["head"] | invalid}
        file.write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(HistoError, match=r"hf_histo\.json"):
            hub.load(result.adapter)


def test_a_kept_output_layer_is_part_of_the_fingerprint(backbone: Path) -> None:
    frozen, trained = (build(backbone, f"--head_on=logits{more}") for more in ("", " --train_output_layer"))
    before = [backbones.fingerprint(model) for model in (frozen, trained)]
    for model in (frozen, trained):
        model.get_submodule(heads.name_of(model)).get_submodule("output").weight.data.add_(1)
    assert backbones.fingerprint(frozen) != before[0]
    assert backbones.fingerprint(trained) == before[1]


def test_the_softmax_of_the_article_gives_probabilities(backbone: Path) -> None:
    model = build(backbone, "--head_softmax --head_on=logits").eval()
    with torch.no_grad():
        logits = model(pixel_values=torch.randn(2, 3, 32, 32)).logits
    torch.testing.assert_close(logits.sum(dim=1), torch.ones(2))
    with pytest.raises(HistoError, match="--head_softmax is True for one logit"):
        build(backbone, "--head_softmax", outputs=1)


def test_dropout_is_before_every_new_layer(backbone: Path) -> None:
    design = heads.HeadConfig((8,), "logits")
    model = backbones.load(str(backbone), 3, head=design, head_dropout=0.5)
    head = model.get_submodule(heads.name_of(model))
    features = torch.randn(2, head.get_submodule("output").in_features)
    assert not torch.equal(head.train()(features), head(features))
    assert torch.equal(head.eval()(features), head(features))
    assert sum(bool(layer._forward_pre_hooks) for layer in head.modules()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_output_layer": True}, "--train_output_layer is True with --head_on features"),
        ({"head": "mlp", "head_widths": "512;256"}, "--head_widths is '512;256'"),
        ({"head": "mlp", "head_widths": ""}, "--head_widths is ''"),
        ({"head": "mlp", "head_widths": "8,0"}, "--head_widths is (8, 0)"),
    ],
)
def test_an_invalid_head(options: dict[str, object], message: str) -> None:
    with pytest.raises(HistoError) as caught:
        heads.HeadConfig.of(ModelOptions(**options))  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_lora_on_the_head_and_a_backbone_without_output_layer_are_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(HistoError, match="matches the head"):
        adapters.add(build(backbone, "--head_on=logits"), AdapterOptions(target_modules=r".*\.output"))
    torch.manual_seed(0)
    headless = backbones.load("test_resnet.r160_in1k", 10, random_weights=True)
    state = {key: value for key, value in headless.state_dict().items() if ".fc." not in key}
    headless.save_pretrained(tmp_path / "headless", state_dict=state)
    with pytest.raises(HistoError, match="--head_on logits needs its output layer"):
        build(tmp_path / "headless", "--head_on=logits")


def test_a_full_run_has_the_plain_head(backbone: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    with pytest.raises(HistoError, match="--method full"):
        run_config(config(tmp_path / "run", backbone, data, "--method=full", "--head=mlp"), load(data))
