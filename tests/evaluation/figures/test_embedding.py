"""Features are the input of the head, and the map draws them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from miniature import write_backbone, write_data
from peft import PeftModel
from torch import nn

from hf_histo.config import AdapterOptions
from hf_histo.data.load import load
from hf_histo.evaluation.figures import embedding
from hf_histo.evaluation.forward import forward
from hf_histo.models import adapters, backbones, heads
from hf_histo.transforms.pipeline import Pipeline
from hf_histo.transforms.preprocessing import Preprocessing

PIPELINE = Pipeline(Preprocessing(32, 32, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


@pytest.mark.parametrize("method", ["lora", "linear", "none"])
def test_the_head_of_the_features_is_the_logits(tmp_path: Path, method: str) -> None:
    data = load(write_data(tmp_path / "data"), cache_dir=tmp_path / "cache")["val"]
    model: nn.Module = backbones.load(str(write_backbone(tmp_path / "backbone")), 1)
    if method != "none":
        model = adapters.add(model, AdapterOptions(method=method))  # type: ignore[arg-type]
    features = embedding.features(model, data, PIPELINE)
    assert features.shape[0] == len(data)
    head = heads.module_of(model)
    expected = head(torch.from_numpy(features).float()).detach().double().numpy()
    np.testing.assert_allclose(forward(model, data, PIPELINE), expected, rtol=1e-4, atol=1e-5)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            assert embedding.features(model, data, PIPELINE).shape == features.shape


def test_the_map_is_drawn(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = {"before": random.normal(size=(40, 6)), "after": random.normal(size=(40, 6))}
    colorings = {"center": ["0", "1"] * 20, "class": ["normal"] * 20 + ["hidden"] * 20}
    embedding.embedding_map(features, colorings, tmp_path / "map.png")
    with PIL.Image.open(tmp_path / "map.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100
