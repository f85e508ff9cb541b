"""Exported models give the logits of the classifier, without this package."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
import timm
import torch
from miniature import OF_SLIDES, SIZE, write_adapter, write_backbone, write_hf_vit
from timm.data import resolve_data_config
from torchvision import transforms
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_histo import export as module
from hf_histo.config import AdapterOptions
from hf_histo.errors import HistoError
from hf_histo.export import export
from hf_histo.hub import load
from hf_histo.inference import Classifier
from hf_histo.models import heads
from hf_histo.transforms.augmentation import TestTimeViews

PIXELS = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "model")


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        answer = model.eval()(PIXELS)
    return getattr(answer, "logits", answer).numpy()


def exported(adapter: Path, folder: Path, format: str) -> tuple[np.ndarray, dict[str, object]]:
    """The logits that the adapter gives, and the statement of its export in `folder`."""
    model, sidecar = load(adapter)
    expected = logits(model)
    assert np.ptp(expected) > 0.1
    export(model, sidecar, folder, format)
    return expected, json.loads((folder / "export.json").read_text())


def test_a_merged_checkpoint_is_one_of_transformers_and_of_timm(backbone: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", backbone, outputs=3)
    expected, statement = exported(adapter, tmp_path / "out", "merged")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "out", dtype="float32")
    assert not [name for name, _ in plain.named_modules() if "lora" in name or "modules_to_save" in name]
    np.testing.assert_allclose(logits(plain), expected, rtol=0, atol=1e-5)
    assert plain.config.id2label == {0: "normal", 1: "tumor", 2: "other"}
    assert tuple(AutoImageProcessor.from_pretrained(tmp_path / "out").data_config["input_size"]) == (3, SIZE, SIZE)

    bare = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    np.testing.assert_allclose(logits(bare), expected, rtol=0, atol=1e-5)
    declared = resolve_data_config(model=bare)
    assert tuple(declared["input_size"]) == (3, SIZE, SIZE)
    assert declared["crop_pct"] == 1
    assert statement["not_included"] == []


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k", "hf-vit"])
def test_the_folder_of_a_merged_checkpoint_is_a_pipeline(name: str, outputs: int, tmp_path: Path) -> None:
    backbone = write_hf_vit(tmp_path / "hf") if name == "hf-vit" else write_backbone(tmp_path / "timm", name)
    lora = AdapterOptions(target_modules="last-conv" if "resnet" in name else "attention-qkvo")
    adapter = write_adapter(tmp_path / "adapter", backbone, outputs=outputs, lora=lora)
    exported(adapter, tmp_path / "out", "merged")
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    predicted = pipeline("image-classification", model=str(tmp_path / "out"))(image)
    table = Classifier.from_pretrained(adapter)(image)
    expected = dict(zip(table.attrs["label_names"][-outputs:], np.atleast_1d(table["probability"][0]), strict=True))
    assert {entry["label"]: entry["score"] for entry in predicted} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k"])
def test_onnx_gives_the_logits_for_any_batch(name: str, tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone", name)
    lora = AdapterOptions(target_modules="last-conv" if "resnet" in name else "attention-qkv")
    adapter = write_adapter(tmp_path / "adapter", backbone, lora=lora)
    expected, statement = exported(adapter, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 4, 5):
        (answer,) = session.run(["logits"], {"pixel_values": PIXELS[:count].numpy()})
        np.testing.assert_allclose(answer, expected[:count], rtol=0, atol=1e-4)
    written = {prop.key: json.loads(prop.value) for prop in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert written["preprocessing"] == statement["preprocessing"]
    assert written["preprocessing"]["image_size"] == SIZE
    assert statement["labels"] == {"0": "tumor"}


def test_a_head_of_several_layers_goes_to_onnx_only(backbone: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", backbone, outputs=3, head=heads.HeadConfig(widths=(7,)))
    model, sidecar = load(adapter)
    with pytest.raises(HistoError, match=r"hidden layers of 7 .*--format onnx"):
        export(model, sidecar, tmp_path / "merged", "merged")
    expected, _ = exported(adapter, tmp_path / "onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"pixel_values": PIXELS.numpy()})
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "onnx"]


def test_a_grouped_convolution_can_not_be_merged(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "backbone", "test_efficientnet.r160_in1k")
    lora = AdapterOptions(target_modules=r".*blocks\.4\.0\.conv_dw", lora_rank=192)
    model, sidecar = load(write_adapter(tmp_path / "adapter", backbone, lora=lora))
    with pytest.raises(HistoError, match=r"can't be merged.*without groups"):
        export(model, sidecar, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


def test_an_onnx_file_with_other_logits_is_not_written(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sidecar = load(write_adapter(tmp_path / "adapter", backbone))
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(HistoError, match=r"differ from PyTorch's by .*nothing was written"):
        export(model, sidecar, tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_is_left_out_is_reported(backbone: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = write_adapter(tmp_path / "adapter", backbone, views=TestTimeViews(8))
    _, statement = exported(adapter, tmp_path / "out", "merged")
    assert statement["not_included"] == ["the mean over 8 views"]
    assert re.search("not part of the exported model: the mean over 8 views", caplog.text)


def test_a_folder_that_exists_is_kept(backbone: Path, tmp_path: Path) -> None:
    model, sidecar = load(write_adapter(tmp_path / "adapter", backbone))
    with pytest.raises(HistoError, match="exists already"):
        export(model, sidecar, tmp_path / "adapter", "merged")


def of_wsinfer(folder: Path, patches: list[PIL.Image.Image]) -> torch.Tensor:
    """What WSInfer (wsinfer.modellib: transforms.py, run_inference.py) does with patches up to the model's output."""
    config = json.loads((folder / "config.json").read_text())
    known = {"Resize": transforms.Resize, "ToTensor": transforms.ToTensor, "Normalize": transforms.Normalize}
    transform = transforms.Compose([known[step["name"]](**step.get("arguments", {})) for step in config["transform"]])
    model = torch.jit.load(folder / "torchscript_model.pt", map_location="cpu").eval()
    with torch.no_grad():
        output: torch.Tensor = model(torch.stack([transform(patch) for patch in patches]))
    return output


@pytest.mark.parametrize(
    ("name", "outputs", "changes"),
    [
        ("test_resnet.r160_in1k", 1, {"patch_size": SIZE}),
        ("test_vit.r160_in1k", 3, {"patch_size": 24}),
        ("test_resnet.r160_in1k", 3, {"patch_size": 64, "resize_size": 37}),
        ("test_resnet.r160_in1k", 1, {"patch_size": 24, "resize_size": 36, "interpolation": "bicubic", "fit": "pad"}),
        ("test_resnet.r160_in1k", 1, {"patch_size": 24, "interpolation": "nearest", "fit": "squash"}),
    ],
)
def test_wsinfer_gives_the_calibrated_probabilities(
    name: str, outputs: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    backbone = write_backbone(tmp_path / "backbone", name)
    options = {"outputs": outputs, "temperature": 1.7}
    options["lora"] = AdapterOptions(target_modules="last-conv" if "resnet" in name else "attention-qkv")
    adapter = write_adapter(tmp_path / "adapter", backbone, changes=OF_SLIDES | changes, **options)
    export(*load(adapter), tmp_path / "out", "wsinfer")
    # Patches of slides of the resolution of training and of half of it, read at level 0 by WSInfer.
    size, random = changes["patch_size"], np.random.default_rng(1)
    patches = [PIL.Image.fromarray(random.integers(0, 256, (n, n, 3), np.uint8)) for n in (size, 2 * size)]
    output = of_wsinfer(tmp_path / "out", patches)
    # As `slides.read_patch` resizes.
    read = [patch.resize((size, size), PIL.Image.Resampling.BILINEAR) for patch in patches]
    classifier = Classifier.from_pretrained(adapter)
    probabilities = torch.softmax(output, 1).numpy()
    np.testing.assert_allclose(probabilities, classifier.probabilities(read).to_numpy(), rtol=0, atol=1e-5)
    logits = classifier(read).logits.reshape(2, -1)
    differences = output[:, 1:] - output[:, :1] if outputs == 1 else output
    np.testing.assert_allclose(1.7 * differences.numpy(), logits, rtol=0, atol=1e-4)
    assert np.ptp(logits) > 0.1

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # All fields of WSInfer's model zoo (model-config.schema.json), which QuPath's extension reads as well.
    assert {key: value for key, value in config.items() if key != "transform"} == {
        "spec_version": "1.0",
        "architecture": name.split(".")[0],
        "num_classes": max(2, outputs),
        "class_names": ["normal", "tumor", "other"][: max(2, outputs)],
        "patch_size_pixels": size,
        "spacing_um_px": 0.5,
    }
    steps = {step["name"]: step.get("arguments") for step in config["transform"]}
    assert list(steps) == ["Resize", "ToTensor", "Normalize"]
    assert steps["Resize"] == {"size": size}  # a number, as the extension expects


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        ({}, {"mpp": None}, r"needs the micrometers per pixel .*train it on slides"),
        ({"views": TestTimeViews(8)}, {}, r"can't express the mean over 8 views, .*--format onnx"),
        ({"adapt_batch_norm": True}, {}, r"can't express batch-norm statistics of the images at hand"),
        ({"threshold": 0.3}, {}, r"can't express a threshold of 0\.3, where WSInfer chooses"),
        ({}, {"interpolation": "lanczos"}, r"can't express resizing by lanczos"),
    ],
)
def test_what_wsinfer_can_not_express_is_refused(
    backbone: Path, tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", backbone, changes=OF_SLIDES | changes, **options)
    with pytest.raises(HistoError, match=reason):
        export(*load(adapter), tmp_path / "out", "wsinfer")
    assert not (tmp_path / "out").exists()
