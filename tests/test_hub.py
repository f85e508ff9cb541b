"""The adapter folder: what is in it, and that anybody gets the same logits from it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from miniature import config, write_backbone, write_data
from safetensors.torch import load_file, save_file

from hf_histo import hub
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation import predictions
from hf_histo.finetune import Result, fine_tune
from hf_histo.models import adapters, backbones
from hf_histo.training import trainer
from hf_histo.transforms.augmentation import Views

DESIGNED = {
    "adapter_config.json",
    "preprocessor_config.json",
    "adapter_model.safetensors",
    "hf_histo.json",
    "README.md",
    "metrics.json",
    "predictions/val.parquet",
    "predictions/test.parquet",
}
ROOT = Path(hub.__file__).parents[1]
QUICK = ["--target_modules=last-conv"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("source")
    return write_backbone(folder / "backbone"), write_data(folder / "data")


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
    """A copy to damage."""
    return shutil.copytree(results["frozen"].adapter, tmp_path / "adapter")


def logits(folder: Path, split: str) -> np.ndarray:
    return predictions.array(predictions.read(folder / "predictions" / f"{split}.parquet"), "logit")


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
    names: dict[str, Any] = {"pixel_values": hub.Sidecar.read(folder).preprocessing(batch)}
    with torch.no_grad():
        exec(bare, names)
    np.testing.assert_allclose(names["logits"][:, 0].numpy(), logits(folder, "test"), rtol=0, atol=1e-5)


def test_the_card_is_one_for_the_hub(results: dict[str, Result]) -> None:
    card = ModelCard.load(results["frozen"].adapter / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-classification"
    assert {"hf_histo", "lora"} <= set(card.data.tags)
    accuracy = results["frozen"].metrics["splits"]["test"]["overall"]["accuracy"]["value"]
    assert f"{accuracy:.3f}" in card.text or f"{accuracy:.4f}" in card.text


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
    for name in ("adapter_model.safetensors", "metrics.json"):
        assert (again.adapter / name).read_bytes() == (results["frozen"].adapter / name).read_bytes(), name


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
    [("image_size", "32"), ("image_size", -1), ("resize_size", 8), ("interpolation", "magic"), ("std", [0, 1, 1]),
     ("mean", [0.5]), ("fit", "magic")],
)  # fmt: skip
def test_a_sidecar_with_a_strange_preprocessing(adapter: Path, key: str, value: object) -> None:
    file = adapter / "hf_histo.json"
    content = json.loads(file.read_text())
    content["preprocessing"][key] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "hf_histo.json" in refusal(adapter)


def test_a_sidecar_older_than_an_option(adapter: Path) -> None:
    file = adapter / "hf_histo.json"
    content = json.loads(file.read_text())
    assert content["views"] == {"count": 1, "augmentation": "square", "seed": 0}
    content["views"] = 8
    del content["preprocessing"]["fit"], content["adapt_batch_norm"]
    file.write_text(json.dumps(content), encoding="utf-8")
    sidecar = hub.Sidecar.read(adapter)
    assert sidecar.preprocessing.fit == "crop"
    assert sidecar.views == Views(8)
    assert not sidecar.adapt_batch_norm


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
    never = r"trust_remote_code(?!=False)|import pickle|yaml\.load\(|torch\.load\(|(?<![.\w])(?:eval|exec)\("
    assert not [(path, match) for path in files for match in re.findall(never, path.read_text(encoding="utf-8"))]


def test_a_folder_of_no_run_and_a_name_without_a_network(tmp_path: Path) -> None:
    assert "hf_histo.json" in refusal(tmp_path)
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


@pytest.mark.parametrize("part", ["card", "write_json"])
def test_a_save_that_fails_leaves_the_old_folder(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Result], part: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError("disk full")

    model, sidecar, _ = hub.load(adapter)
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    monkeypatch.setattr(hub, part, fail)
    with pytest.raises(OSError, match="disk full"):
        hub.save(adapter, model, sidecar, metrics=results["frozen"].metrics, tables={})
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_a_save_replaces_an_older_folder(adapter: Path, results: dict[str, Result]) -> None:
    (adapter / "old.txt").touch()
    model, sidecar, _ = hub.load(adapter)
    hub.save(adapter, model, sidecar, metrics=results["frozen"].metrics, tables={})
    assert not (adapter / "old.txt").exists()
    assert hub.load(adapter)[1] == sidecar


def test_a_refused_upload_is_one_line(adapter: Path) -> None:
    with pytest.raises(HistoError) as caught:
        hub.push(adapter, "nobody/nothing")
    assert str(caught.value).startswith("--hub_model_id nobody/nothing: ")
    assert "\n" not in str(caught.value)
