"""The scale of the trained update: chosen on val, in the saved weights, recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_folders import QUICK, logits
from miniature import config
from safetensors.torch import load_file

from hf_histo.data.load import load
from hf_histo.evaluation.metrics import classification
from hf_histo.files import read_json
from hf_histo.finetune import run_config
from hf_histo.inference import Classifier

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("wanted", ["auto", "0.3"])
def test_the_scaled_update_is_what_is_saved(wanted: str, source: tuple[Path, Path], tmp_path: Path) -> None:
    """Beside the same run without a scale."""
    metric = "--metric_for_best_model=loss"
    run = run_config(config(tmp_path / "run", *source, *QUICK, f"--update_scale={wanted}", metric), load(source[1]))
    plain = run_config(config(tmp_path / "plain", *source, *QUICK, metric), load(source[1]))
    recorded = read_json(run.adapter / "metrics.json")["update_scale"]
    scale = recorded["value"]
    if wanted == "auto":
        losses = {float(step): value for step, value in recorded["values"].items()}
        assert len(losses) == 11 and losses[scale] == min(losses.values())
        assert (recorded["split"], recorded["metric"]) == ("val", "loss")
        full = classification.of_logits(logits(plain.adapter, "val"), load(source[1])["val"]["label"])["loss"]
        assert losses[1.0] == pytest.approx(full, abs=1e-6)
    else:
        assert recorded == {"value": 0.3}
    assert read_json(run.adapter / "hf_histo.json")["update_scale"] == scale
    assert f"is multiplied by {scale:g}" in (run.adapter / "README.md").read_text(encoding="utf-8")
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (run.adapter, plain.adapter))
    for name, weight in theirs.items():
        expected = weight * scale if ".lora_B." in name else weight
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-7)
    again = Classifier.from_pretrained(run.adapter).predict(load(source[1])["val"])
    torch.testing.assert_close(
        torch.from_numpy(again.logits), torch.from_numpy(logits(run.adapter, "val")), rtol=0, atol=1e-5
    )
