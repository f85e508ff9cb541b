"""Prediction: this package from stored images to logits, beside models that are fed from memory, and stock practice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from hf_histo.adapter.sidecar import BackboneRecord, DataRecord, Sidecar
from hf_histo.errors import HistoError
from hf_histo.evaluation.forward import FEW, forward
from hf_histo.experiments.benchmark import peers
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.experiments.benchmark.timing import OURS, Unavailable
from hf_histo.export import export
from hf_histo.models import adapters, backbones, batchnorm
from hf_histo.models.speed import folding
from hf_histo.transforms.augmentation import TestTimeViews

VIEWS = 8  # of the square
MERGED = "merged and folded model, fed from memory"
UNMERGED = "unmerged model, fed from memory"
STOCK = "stock: PIL transforms, Trainer.predict, float32"
ONNX_RUNTIME, OPENVINO = "ONNX Runtime, fed from memory", "OpenVINO, fed from memory"


def several(side: str) -> str:
    """The name of a side that predicts from `VIEWS` views."""
    return f"{side}, {VIEWS} views"


def in_bf16(side: str) -> str:
    """The name of a side that computes in bfloat16."""
    return f"{side}, bf16"


def sides(bench: Bench) -> dict[str, Callable[[], float]]:
    """Seconds for an image, in batches of the same size; each side runs a batch first that does not count.

    In float32, and with `--mixed_precision bf16` in that, too. Views take as many times longer, so there are that many
    times fewer images.
    """
    half = {
        in_bf16(OURS): partial(ours, bench, 1, "bf16"),
        in_bf16(MERGED): partial(merged, bench, 1, "bf16"),
        in_bf16(OPENVINO): partial(openvino, bench, "bf16"),
    }
    return {
        OURS: partial(ours, bench, 1),
        MERGED: partial(merged, bench, 1),
        several(OURS): partial(ours, bench, VIEWS),
        several(MERGED): partial(merged, bench, VIEWS),
        UNMERGED: partial(unmerged, bench),
        STOCK: partial(peers.prediction, bench),
        ONNX_RUNTIME: partial(onnx_runtime, bench),
        OPENVINO: partial(openvino, bench),
        **(half if bench.precision == "bf16" else {}),
    }


def count(bench: Bench, views: int) -> int:
    """The number of images to predict, more than `FEW` at any rate: of fewer, this package merges nothing."""
    images = len(bench.data()["val"])
    return max(images // views, min(images, FEW + 1))


def ours(bench: Bench, views: int, precision: Literal["no", "bf16"] = "no") -> float:
    model, pixels = ready(bench)
    pipeline = replace(bench.pipeline(model, bench.config), test_time_views=TestTimeViews(views))
    rows = bench.data()["val"].select(range(count(bench, views)))
    with torch.no_grad(), _autocast(bench, precision):
        model(pixel_values=pixels)
    started = time.perf_counter()
    forward(
        model,
        rows,
        pipeline,
        batch_size=bench.batch,
        num_workers=bench.config.data.num_workers,
        mixed_precision=precision,
    )
    return (time.perf_counter() - started) / len(rows)


def merged(bench: Bench, views: int, precision: str = "no") -> float:
    model, pixels = ready(bench)
    with torch.no_grad(), folding.merged(model, pixels[:1]) as is_merged:
        if not is_merged and (isinstance(model, PeftModel) or batchnorm.layers(model)):
            raise Unavailable("merging changes the logits here, so this package does without")
        with _autocast(bench, precision):
            return _fed(bench, lambda batch: model(pixel_values=batch).logits.float().cpu(), pixels, views)


def unmerged(bench: Bench) -> float:
    model, pixels = ready(bench)
    with torch.no_grad():
        return _fed(bench, lambda batch: model(pixel_values=batch).logits.float().cpu(), pixels)


def onnx_runtime(bench: Bench) -> float:
    try:
        import onnxruntime
    except ImportError:
        raise Unavailable("not installed: pip install 'hf_histo[onnx]'") from None
    provider = "CPUExecutionProvider" if bench.device.type == "cpu" else "CUDAExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Unavailable(f"the installed onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx(bench), options, providers=[provider])
    return _fed(bench, lambda batch: session.run(None, {"pixel_values": batch}), _numpy(bench))


def openvino(bench: Bench, precision: str = "f32") -> float:
    try:
        import openvino
    except ImportError:
        raise Unavailable("not installed: pip install openvino") from None
    if bench.device.type != "cpu":
        raise Unavailable("not measured beside a GPU, which it does not use")
    # On a CPU that has it, OpenVINO would take bf16 by itself.
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    model = openvino.Core().compile_model(_onnx(bench), "CPU", settings)
    return _fed(bench, lambda batch: model({"pixel_values": batch}), _numpy(bench))


def ready(bench: Bench) -> tuple[nn.Module, torch.Tensor]:
    """A model as this package predicts with it, and a batch for it."""
    model = adapters.channels_last(bench.adapted().to(bench.device)).eval()
    return model, bench.pixels(model)


def _autocast(bench: Bench, precision: str) -> torch.autocast:
    return torch.autocast(bench.device.type, torch.bfloat16, enabled=precision == "bf16")


def _fed(bench: Bench, predict: Callable[[Any], object], pixels: Any, views: int = 1) -> float:
    """Seconds for an image where `predict` gets the first rows of `pixels` again and again."""
    images = count(bench, views)
    predict(pixels)
    started = time.perf_counter()
    for start in range(0, images, bench.batch):
        for _ in range(views):
            predict(pixels[: images - start])
    return (time.perf_counter() - started) / images


def _numpy(bench: Bench) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(bench.pixels(bench.backbone(1)).cpu().numpy())


def _onnx(bench: Bench) -> Path:
    """The model as `hf_histo export --format onnx` writes it, for all repetitions."""
    folder = bench.folder / "onnx"
    if not folder.exists():
        model = bench.adapted()
        source = backbones.locate(bench.config.model.backbone)
        sidecar = Sidecar(
            method=bench.config.adapter.method,
            label_names=["normal", "tumor"],
            num_outputs=1,
            backbone=BackboneRecord(source, bench.config.model.revision, "not read"),
            batch_norm=bench.config.model.batch_norm,
            preprocessing=bench.preprocessing(model),
            data=DataRecord("benchmark", "not read"),
        )
        try:
            export(model, sidecar, folder, "onnx")
        except (HistoError, torch.onnx.OnnxExporterError) as error:
            raise Unavailable(" ".join(str(error).split())[:200]) from None
    return folder / "model.onnx"
