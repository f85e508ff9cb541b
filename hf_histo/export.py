"""Export of a trained classifier for use without this package: merged weights, or ONNX.

Both contain the model only: from normalized pixels (B, 3, S, S) to logits. `export.json` beside it describes how an
image becomes the input and the logits a decision, and lists the steps that the exported model does not include.
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
from transformers import PreTrainedModel

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.errors import HistoError
from hf_histo.files import atomic_folder, write_json
from hf_histo.models import adapters, clip

logger = logging.getLogger(__name__)

STATEMENT = "export.json"
FORMATS = ("merged", "onnx")
# Largest difference of logits between PyTorch and ONNX Runtime, which sum in different orders; relative above 1.
TOLERANCE = 1e-4


def export(model: nn.Module, sidecar: Sidecar, folder: str | Path, format: str) -> None:
    """Write a model that was loaded by `hub.load` to a new folder, atomically.

    Args:
        model: the model; its adapter, unless the method is "full", is merged into it.
        sidecar: the adapter's sidecar.
        folder: output folder, which must not exist.
        format: "merged": a checkpoint that `AutoModelForImageClassification` loads, and timm if the backbone is one of
            timm. "onnx": `model.onnx`, for batches of any size, whose logits are compared with those of PyTorch.

    Raises `HistoError` for an adapter that can't be merged, a head that transformers alone can't build ("merged"), a
    package that is missing, and logits that differ by more than `TOLERANCE` ("onnx").
    """
    folder = Path(folder)
    if folder.exists():
        raise HistoError(f"--output_dir {folder} exists already; choose another one, or remove it")
    whole = merged(model)
    left_out = sidecar.beside_the_model
    for part in left_out:
        logger.warning("not part of the exported model: %s", part)
    with atomic_folder(folder) as temporary:
        if format == "merged":
            _save(whole, sidecar, temporary)
            found = {}
        else:
            found = {"onnx": _to_onnx(whole, sidecar, temporary / "model.onnx")}
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
    differences = []
    for count, true in expected.items():  # other batch sizes than that of the export
        (answer,) = session.run(None, {"pixel_values": pixels[:count]})
        differences.append(float(np.abs(answer - true).max() / max(1, np.abs(true).max())))
    if not max(differences) <= TOLERANCE:
        raise HistoError(
            f"the logits of ONNX Runtime differ from PyTorch's by {max(differences):.2g}, expected at most "
            f"{TOLERANCE:g}; nothing was written: export this model as --format merged"
        )
    return {"opset": written.opset_import[0].version, "largest_difference": max(differences)}
