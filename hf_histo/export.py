"""Export of a trained classifier for use without this package: merged weights, ONNX, or a model folder of WSInfer.

The first two contain the model only: from normalized pixels (B, 3, S, S) to logits. `export.json` beside it describes
how an image becomes the input and the logits a decision, and lists the steps that the exported model does not include.
WSInfer's folder gives the classifier's calibrated probabilities, or is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import interpolate
from torchvision import transforms
from transformers import PreTrainedModel

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.errors import HistoError
from hf_histo.files import atomic_folder, require_new, write_json
from hf_histo.models import adapters, clip
from hf_histo.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

STATEMENT = "export.json"
# Largest difference of logits between PyTorch and ONNX Runtime, which sum in different orders, or TorchScript;
# relative above 1.
TOLERANCE = 1e-4
TORCHSCRIPT = "torchscript_model.pt"  # as WSInfer's model zoo and its extension of QuPath call it


def export(model: nn.Module, sidecar: Sidecar, folder: str | Path, format: str) -> None:
    """Write a model that was loaded by `hub.load` to a new folder, atomically.

    Args:
        model: the model; its adapter, unless the method is "full", is merged into it.
        sidecar: the adapter's sidecar.
        folder: output folder, which must not exist.
        format: "merged": a checkpoint that `AutoModelForImageClassification` loads, and timm if the backbone is one of
            timm. "onnx": `model.onnx`, for batches of any size, whose logits are compared with those of PyTorch.
            "wsinfer": `torchscript_model.pt` and `config.json`, see `_to_wsinfer`, compared likewise.

    Raises `HistoError` for an adapter of bags, and one that can't be merged, a head that transformers alone can't build
    ("merged"), a package that is missing ("onnx"), a step that the format can't express ("wsinfer"), and logits that
    differ by more than `TOLERANCE` ("onnx" and "wsinfer").
    """
    folder = Path(folder)
    require_new("--output_dir", folder)
    sidecar.require_images("the adapter", "use hf_histo predict")
    if format == "wsinfer":
        _refuse_beyond_wsinfer(sidecar)
    whole = merged(model)
    left_out = sidecar.beside_the_model
    for part in left_out:
        logger.warning("not part of the exported model: %s", part)
    with atomic_folder(folder) as temporary:
        if format == "merged":
            _save(whole, sidecar, temporary)
            found = {}
        elif format == "onnx":
            found = {"onnx": _to_onnx(whole, sidecar, temporary / "model.onnx")}
        else:
            found = _to_wsinfer(whole, sidecar, temporary)
        statement = {
            "format": format,
            "input": f"pixel_values: float32 (batch, 3, {sidecar.preprocessing.image_size}, same)",
            "preprocessing": dataclasses.asdict(sidecar.preprocessing),
            "output": f"logits: float32 (batch, {sidecar.num_outputs})",
            "probability": "sigmoid of the logit" if sidecar.num_outputs == 1 else "softmax of the logits",
            "labels": sidecar.id2label,
            "label_names": sidecar.label_names,
            "threshold": sidecar.threshold,
            "thresholds": {k: v for k, v in sidecar.thresholds.items() if not k.startswith("balanced-")},
            "temperature": sidecar.temperature,
            "not_included": left_out,
            "versions": sidecar.versions,
            **found,
        }
        write_json(temporary / STATEMENT, statement)


def merged(model: nn.Module) -> PreTrainedModel:
    """Merge LoRA and the trained head into the backbone, and remove peft's layers; see `adapters.merged`.

    A model without an adapter is returned unchanged. Raises `HistoError` if the update of a layer can't be merged.
    """
    whole = adapters.merged(model) if isinstance(model, PeftModel) else model
    assert isinstance(whole, PreTrainedModel)
    whole.eval()
    return whole


def _save(model: PreTrainedModel, sidecar: Sidecar, folder: Path) -> None:
    if not sidecar.head.is_plain:
        raise HistoError(
            f"the classifier is {sidecar.head}, which transformers and timm alone can't build; expected one linear "
            "layer on pooled features; --format onnx takes any"
        )
    if isinstance(model, clip.OpenClipForImageClassification):
        raise HistoError("the backbone is open_clip's, which transformers and timm can't build; expected --format onnx")
    views, config = sidecar.preprocessing, model.config
    config.id2label, config.label2id = sidecar.id2label, {label: i for i, label in sidecar.id2label.items()}
    if declared := getattr(config, "pretrained_cfg", None):  # timm reads its preprocessing from it
        config.model_args = config.model_args or {}  # timm does not accept null
        config.label_names = list(sidecar.id2label.values())
        config.pretrained_cfg = {
            **declared,
            "input_size": [3, views.image_size, views.image_size],
            "crop_pct": views.image_size / views.resize_size,
            "crop_mode": {"crop": "center", "squash": "squash", "pad": "border"}[views.fit],
            "interpolation": views.interpolation,
            "mean": views.mean,
            "std": views.std,
        }
    elif processor := views.image_processor():
        processor.save_pretrained(folder)
    # timm expects weights without the prefix of transformers' wrapper, which accepts both forms.
    model.save_pretrained(folder, state_dict={k.removeprefix("timm_model."): v for k, v in model.state_dict().items()})


class _Logits(nn.Module):
    """Wraps a model so that it returns the logits as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def _to_onnx(model: PreTrainedModel, sidecar: Sidecar, path: Path) -> dict[str, Any]:
    """Write the ONNX file; return its opset and the largest difference of its logits from PyTorch's."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter is written in it
    except ImportError as error:
        raise HistoError(f"--format onnx needs {error.name}: pip install 'hf_histo[onnx]'") from None
    size, random = sidecar.preprocessing.image_size, np.random.default_rng(0)
    pixels = random.standard_normal((3, 3, size, size), dtype=np.float32)
    logits = _Logits(model).to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        expected = {count: logits(torch.from_numpy(pixels[:count])).numpy() for count in (1, 3)}
    transformer: Any = getattr(model, "timm_model", None)
    if getattr(transformer, "dynamic_img_size", False):
        transformer.set_input_size(size)  # resample position embeddings here; torch 2.11 exports another bicubic
    torch.onnx.export(
        logits,
        (torch.from_numpy(pixels[:2]),),
        path,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: "batch"}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    written = onnx.load(path)
    stated = {"preprocessing": dataclasses.asdict(sidecar.preprocessing), "labels": sidecar.id2label}
    onnx.helper.set_model_props(written, {key: json.dumps(value) for key, value in stated.items()})
    onnx.save(written, path)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    # Other batch sizes than that of the export.
    answers = {count: session.run(None, {"pixel_values": pixels[:count]})[0] for count in expected}
    difference = _difference(answers, expected, "ONNX Runtime")
    return {"opset": written.opset_import[0].version, "largest_difference": difference}


def _difference(answers: dict[int, Any], expected: dict[int, Any], runtime: str) -> float:
    """The largest difference of logits in batches of each size. Raises HistoError if it is above `TOLERANCE`."""
    differences = [np.abs(answers[count] - true).max() / max(1, np.abs(true).max()) for count, true in expected.items()]
    largest = float(max(differences))
    if not largest <= TOLERANCE:
        raise HistoError(
            f"the logits of {runtime} differ from PyTorch's by {largest:.2g}, expected at most {TOLERANCE:g}; nothing "
            "was written: export this model as --format merged"
        )
    return largest


class _LogitsOfPatches(nn.Module):
    """From patches as WSInfer normalizes them, float32 (B, 3, P, P), to calibrated logits of all classes, (B, K).

    The size of a patch is that of the slide reader. Where the model's differs, values are those of `Preprocessing`: on
    a CPU, both resize bytes.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.size, self.side = preprocessing.image_size, preprocessing.resize_size
        self.start = round((self.side - self.size) / 2)
        self.interpolation = preprocessing.interpolation
        self.temperature = temperature
        self.mean = nn.Buffer(torch.tensor(preprocessing.mean).view(3, 1, 1))
        self.std = nn.Buffer(torch.tensor(preprocessing.std).view(3, 1, 1))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        if patches.shape[-1] != self.side:
            values = ((patches * self.std + self.mean) * 255).round()
            if patches.device.type == "cpu":
                values = values.to(torch.uint8)
            size = [self.side, self.side]
            if self.interpolation == "nearest":
                values = interpolate(values, size, mode="nearest")
            else:
                values = interpolate(values, size, mode=self.interpolation, align_corners=False, antialias=True)
            patches = (values.float().round().clamp(0, 255) / 255 - self.mean) / self.std
        end = self.start + self.size
        logits = torch.div(self.model(patches[:, :, self.start : end, self.start : end]), self.temperature)
        if logits.shape[1] == 1:  # QuPath takes the softmax of one logit as well, which is 1 for every patch
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits


def _refuse_beyond_wsinfer(sidecar: Sidecar) -> None:
    """Raise HistoError for what a model folder of WSInfer can't express."""
    views = sidecar.preprocessing
    if views.mpp is None or views.patch_size is None:
        raise HistoError(
            "--format wsinfer needs the micrometers per pixel and the size of patches, which this adapter, trained on "
            "image files, does not state; train it on slides, or export it as --format onnx"
        )
    steps = list(sidecar.beside_the_model)
    if views.interpolation == "lanczos":
        steps.append("resizing by lanczos")
    if sidecar.threshold != 0.5:
        steps.append(f"a threshold of {sidecar.threshold:g}, where WSInfer chooses the most probable class")
    if steps:
        raise HistoError(
            f"--format wsinfer can't express {'; '.join(steps)}, expected an adapter without; export it as --format "
            "onnx"
        )


def _to_wsinfer(model: PreTrainedModel, sidecar: Sidecar, folder: Path) -> dict[str, Any]:
    """Write a model folder of WSInfer; return the entries of `export.json` that differ from other formats.

    `config.json` has the fields of WSInfer's model zoo (github.com/SBU-BMI/wsinfer-zoo, model-config.schema.json).
    WSInfer reads patches of the physical size at level 0 and applies `transform`, resizing by PIL's bilinear filter as
    `slides.read_patch` does; then it takes the softmax of the TorchScript's output.
    """
    views = sidecar.preprocessing
    assert views.patch_size is not None
    declared: dict[str, Any] = {
        "spec_version": "1.0",
        "architecture": getattr(model.config, "architecture", None) or model.config.model_type,
        "num_classes": len(sidecar.label_names),
        "class_names": sidecar.label_names,
        "patch_size_pixels": views.patch_size,
        "spacing_um_px": views.mpp,
        "transform": [
            {"name": "Resize", "arguments": {"size": views.patch_size}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": {"mean": list(views.mean), "std": list(views.std)}},
        ],
    }
    write_json(folder / "config.json", declared)
    logits = _Logits(model).to(memory_format=torch.contiguous_format).eval()
    patches = np.random.default_rng(0).integers(0, 256, (3, views.patch_size, views.patch_size, 3), np.uint8)
    pixels = views(torch.from_numpy(patches).permute(0, 3, 1, 2))
    with torch.no_grad():
        traced = torch.jit.trace(logits, pixels[:2].contiguous())
        torch.jit.script(_LogitsOfPatches(traced, views, sidecar.temperature).eval()).save(str(folder / TORCHSCRIPT))
        written = torch.jit.load(str(folder / TORCHSCRIPT))
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(views.mean, views.std)])
        normalized = torch.stack([transform(patch) for patch in patches])
        expected = {count: logits(pixels[:count]).numpy() / sidecar.temperature for count in (1, 3)}
        answers = {count: written(normalized[:count]).numpy() for count in expected}
    if sidecar.num_outputs == 1:
        answers = {count: answer[:, 1:] - answer[:, :1] for count, answer in answers.items()}
    return {
        "input": f"patches: float32 (batch, 3, {views.patch_size}, same), after the transform of config.json",
        "output": f"logits / temperature: float32 (batch, {len(sidecar.label_names)})",
        "probability": "softmax of the output, which is calibrated",
        "largest_difference": _difference(answers, expected, "TorchScript"),
    }
