"""Caching and folding of frozen layers do not change the result."""

from __future__ import annotations

import shutil
from collections import namedtuple
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from miniature import config

from hf_histo.config import Config
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation.metrics import classification
from hf_histo.models import adapters, backbones, batchnorm
from hf_histo.models.speed import activation_cut
from hf_histo.training import feature_cache, losses, trainer
from hf_histo.transforms.mri import Preparation
from hf_histo.transforms.pipeline import Pipeline

GRAY = Preparation(gray=True)
LINEAR = ["--method=linear", "--augmentation=crop-jitter", "--training_views=1"]
LAST = ["--method=lora", "--target_modules=last-conv", "--augmentation=crop-jitter", "--training_views=2"]


def build(folder: Path, source: tuple[Path, Path], *more: str) -> tuple[trainer.Trainer, Config]:
    options = config(folder / "run", *source, "--logging_steps=1", f"--cache_dir={folder / 'cache'}", *more)
    torch.manual_seed(0)
    model = backbones.load(str(source[0]), 1, head_dropout=options.model.head_dropout)
    batchnorm.freeze(model)
    data = load(source[1])
    session = trainer.build(
        options,
        folder / "run",
        model=adapters.add(model, options.adapter),
        train=ImageTable(data["train"]),
        validation=ImageTable(data["val"]),
        pipeline=Pipeline.of(options, model.config, str(source[0])),
        loss=losses.classification(1),
        compute_metrics=classification.for_trainer(),
    )
    return session, options


def cached(session: trainer.Trainer, options: Config) -> AbstractContextManager[None]:
    return feature_cache.cached_prefix(session, options.speed.cache_features, options.data.cache_dir)


def train(folder: Path, source: tuple[Path, Path], *more: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of training and validation, and the trained weights."""
    session, options = build(folder, source, *more)
    with cached(session, options):
        session.train()
    assert session.model is not None
    curve = [line[key] for line in session.state.log_history for key in ("loss", "eval_loss") if key in line]
    return curve, {n: p.detach() for n, p in session.model.named_parameters() if p.requires_grad}


def stored(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.bin"))


@pytest.mark.parametrize("more", [[*LINEAR, "--head_dropout=0.3"], LAST], ids=["linear", "last-conv"])
def test_the_same_result_to_the_last_bit(tmp_path: Path, source: tuple[Path, Path], more: list[str]) -> None:
    more = [*more, "--num_train_epochs=4"]
    plain, weights = train(tmp_path / "off", source, *more, "--cache_features=off")
    cached, same = train(tmp_path / "on", source, *more)
    assert len(stored(tmp_path / "on")) == 1 + (2 if "--training_views=2" in more else 1)
    assert not stored(tmp_path / "off")
    assert cached == plain
    assert plain[-1] < plain[0]
    for key, tensor in weights.items():
        assert torch.equal(same[key], tensor), key


def test_the_same_result_to_rounding_in_bf16(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    plain, _ = train(tmp_path / "off", source, *LINEAR, "--cache_features=off", "--learning_rate=1e-3")
    cached, _ = train(tmp_path / "on", source, *LINEAR, "--cache_features=on", "--learning_rate=1e-3")
    assert stored(tmp_path / "on")
    assert cached == pytest.approx(plain, abs=0.01)


def test_a_kill_keeps_what_is_complete(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_cut, "CHUNK_ROWS", 8)
    write = activation_cut.Store.write

    def killed(store: activation_cut.Store, view: int, rows: range, activations: torch.Tensor) -> None:
        if rows.start == 16:
            raise KeyboardInterrupt
        write(store, view, rows, activations)

    session, options = build(tmp_path, source, *LINEAR, "--cache_features=on")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(activation_cut.Store, "write", killed)
        with cached(session, options):
            raise AssertionError
    before = {path: path.stat().st_mtime_ns for path in stored(tmp_path)}
    assert len(before) == 2
    with cached(session, options):
        assert session.stored is not None
    after = {path: path.stat().st_mtime_ns for path in stored(tmp_path)}
    assert len(after) == 5  # 24 rows for training, 13 for validation
    assert before.items() <= after.items()


def test_another_seed_shares_them_only_where_it_draws_nothing(tmp_path: Path, source: tuple[Path, Path]) -> None:
    for seed, files in ((0, 2), (1, 3)):
        session, options = build(tmp_path, source, *LINEAR, f"--seed={seed}")
        with cached(session, options):
            assert len(stored(tmp_path)) == files


@pytest.mark.parametrize("changed", ["normalizer", "preprocessing", "preparation", "nothing"])
def test_other_pixels_have_activations_of_their_own(tmp_path: Path, source: tuple[Path, Path], changed: str) -> None:
    """Cached activations must be those that a later run would compute."""
    for other in (False, True):
        session, options = build(tmp_path, source, *LINEAR)
        pipeline = session.pipeline
        if other and changed == "normalizer":
            data = load(source[1])
            session.pipeline = pipeline.fitted(ImageTable(data["train"]), "rgb").extended(data["val"])
        changes: dict[str, Any] = {"preprocessing": {"mean": (0.1, 0.2, 0.3)}, "preparation": {"preparation": GRAY}}
        if other and changed in changes:
            session.pipeline = replace(pipeline, preprocessing=replace(pipeline.preprocessing, **changes[changed]))
        with cached(session, options):
            pass
    assert len(stored(tmp_path)) == (2 if changed == "nothing" else 4)


def test_a_flipped_bit_in_the_cache_does_not_reach_the_adapter(tmp_path: Path, source: tuple[Path, Path]) -> None:
    curve, weights = train(tmp_path, source, *LINEAR)
    for file in stored(tmp_path):
        content = bytearray(file.read_bytes())
        content[3] ^= 0x40  # the exponent of the first number
        file.write_bytes(content)
    shutil.rmtree(tmp_path / "run")
    again, same = train(tmp_path, source, *LINEAR)
    assert again == curve
    assert all(torch.equal(same[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method=linear", "--augmentation=flips"], "--training_views"),
        (["--method=lora", "--target_modules=all-conv", "--training_views=1"], "first trained"),
        ([*LINEAR, "--cutmix_alpha=1"], "images are mixed; leave --mixup_alpha and --cutmix_alpha out"),
    ],
)
def test_where_it_cannot_be_done(tmp_path: Path, source: tuple[Path, Path], more: list[str], message: str) -> None:
    session, options = build(tmp_path, source, *more, "--cache_features=on")
    with pytest.raises(HistoError, match=message), cached(session, options):
        raise AssertionError
    session, options = build(tmp_path, source, *more)
    with cached(session, options):
        assert session.stored is None
    assert not stored(tmp_path)


def test_a_full_disk_is_reported_before(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 1000, 1000))
    session, options = build(tmp_path, source, *LINEAR, "--cache_features=on")
    with pytest.raises(HistoError, match=r"MiB left.*--cache_dir"), cached(session, options):
        raise AssertionError
    assert not stored(tmp_path)


def test_images_are_not_read_while_training(
    tmp_path: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, options = build(tmp_path, source, *LINEAR)
    with cached(session, options):

        def refuse(*args: Any) -> None:
            raise AssertionError

        monkeypatch.setattr("hf_histo.data.schema.decode", refuse)
        session.train()
    assert list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("target_modules", ["last-conv", "all-conv"])
def test_folded_layers_give_the_same_curve(tmp_path: Path, source: tuple[Path, Path], target_modules: str) -> None:
    curves = []
    for folded in (False, True):
        more = [f"--target_modules={target_modules}", "--cache_features=off", "--learning_rate=1e-3"]
        session, _ = build(tmp_path / str(folded), source, *more)
        with feature_cache.folded_layers(session) if folded else nullcontext():
            session.train()
        curves.append([line[key] for line in session.state.log_history for key in ("loss", "eval_loss") if key in line])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_no_graph_is_built_below_the_first_trained_layer(tmp_path: Path, source: tuple[Path, Path]) -> None:
    session, _ = build(tmp_path, source, "--target_modules=last-conv")
    assert session.model is not None
    seen = {}
    for name in ("layer3", "layer4"):
        layer = session.model.get_submodule(f"base_model.model.timm_model.{name}")
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.requires_grad}))
    session.model.train()(pixel_values=torch.randn(2, 3, 32, 32))
    assert seen == {"layer3": False, "layer4": True}
