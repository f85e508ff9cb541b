"""The evaluation view against the pipelines of timm and transformers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from fixtures import stored
from timm.data import create_transform, resolve_data_config
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    PreTrainedConfig,
    ResNetConfig,
    TimmWrapperConfig,
    ViTImageProcessor,
)

from hf_histo.errors import HistoError
from hf_histo.transforms.preprocessing import FITS, Preprocessing, resolve

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
TWO_LEVELS = 2 / 255 / 0.2  # of uint8, after the division by the smallest deviation


def picture(height: int, width: int) -> torch.Tensor:
    """A smooth uint8 picture (3, height, width) with all of the range in it."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 7 + c) * np.cos(y / (5 + c)) for c in range(3)]
    return torch.from_numpy(np.uint8(np.stack(waves) * 127 + 128))


def timm_config(name: str) -> TimmWrapperConfig:
    declared = timm.get_pretrained_cfg(name)
    assert declared is not None
    content = {"architecture": name.split(".")[0], "pretrained_cfg": declared.to_dict()}
    return TimmWrapperConfig.from_dict(content, num_labels=1)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("resnet50.a1_in1k", "center"),
        ("resnet50.a1_in1k", "squash"),
        ("resnet50.a1_in1k", "border"),
        ("vit_small_patch14_dinov2.lvd142m", "center"),
        ("test_vit.r160_in1k", "border"),
    ],
)
@pytest.mark.parametrize("shape", [(96, 96), (300, 300), (260, 200), (100, 171)])
def test_timm_sees_the_same(name: str, mode: str, shape: tuple[int, int]) -> None:
    config = timm_config(name)
    config.pretrained_cfg["crop_mode"] = mode
    preprocessing = resolve(config, "unused")
    image = picture(*shape)
    pipeline = create_transform(**resolve_data_config(pretrained_cfg=config.pretrained_cfg), is_training=False)
    expected = pipeline(PIL.Image.fromarray(image.permute(1, 2, 0).numpy()))
    found = preprocessing(image[None])[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TWO_LEVELS
    assert (found - expected).abs().mean() <= TWO_LEVELS / 10


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=MEAN, image_std=STD),
        CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40}),
        BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}, resample=3),
        ConvNextImageProcessor(size={"shortest_edge": 56}, crop_pct=0.875, resample=3),
        ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=0.875, resample=3),
    ],
    ids=["vit", "clip", "dinov2", "resnet", "convnext-384"],
)
def test_transformers_sees_the_same(processor: ViTImageProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    ResNetConfig().save_pretrained(tmp_path)
    image = picture(96, 72)
    expected = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    found = resolve(PreTrainedConfig(), str(tmp_path))(image[None])[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TWO_LEVELS


def test_an_image_of_the_right_size_is_only_normalized() -> None:
    image = picture(32, 32)[None]
    found = Preprocessing(32, 32, "bicubic", MEAN, STD)(image)
    expected = (image / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_middle_is_kept() -> None:
    image = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    image[..., 10:30, 10:30] = 255
    found = Preprocessing(20, 40, "bilinear", (0.0,) * 3, (1.0,) * 3)(image)
    assert found.min() == 1


def test_a_view_does_not_depend_on_the_batch() -> None:
    images = torch.stack([picture(50, 40), picture(50, 40).flip(-1)])
    preprocessing = Preprocessing(24, 28, "bicubic", MEAN, STD)
    together = preprocessing(images)
    assert torch.equal(together[1], preprocessing(images[1:])[0])


@pytest.mark.parametrize("fit", FITS)
def test_a_view_does_not_depend_on_what_else_is_in_the_table(fit: str) -> None:
    images = [picture(*shape) for shape in ((50, 41), (28, 28), (31, 90), (24, 200), (1, 1), (300, 1), (7, 3))]
    preprocessing = Preprocessing(23, 28, "bicubic", MEAN, STD, fit)
    read = preprocessing.read(stored(*images)).__getitems__(range(len(images)))
    together = preprocessing(torch.stack([sample["image"] for sample in read]))
    for place, image in enumerate(images):
        assert torch.equal(together[place], preprocessing(image[None])[0])


def test_images_of_one_size_are_read_as_they_are() -> None:
    images = [picture(50, 41), picture(50, 41).flip(-1)]
    read = Preprocessing(24, 28, "bicubic", MEAN, STD).read(stored(*images), at_least=40)
    assert all(torch.equal(read[place]["image"], image) for place, image in enumerate(images))


def test_images_of_several_sizes_are_read_as_large_as_they_are_needed() -> None:
    table, preprocessing = stored(picture(50, 41), picture(41, 50)), Preprocessing(24, 28, "bicubic", MEAN, STD)
    assert {preprocessing.read(table, at_least=size)[1]["image"].shape for size in (0, 27, 28)} == {(3, 28, 28)}
    assert preprocessing.read(table, at_least=40)[0]["image"].shape == (3, 40, 40)
    assert pickle.loads(pickle.dumps(preprocessing.read(table)))[0]["image"].shape == (3, 28, 28)  # for workers


def test_what_each_fit_keeps() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[..., :5], image[..., 35:] = 255, 255  # bright ends of the longer side
    cropped, squashed, padded = (
        Preprocessing(20, 20, "bilinear", (0.4,) * 3, (1.0,) * 3, fit).square(image, 20)[0] for fit in FITS
    )
    assert cropped.max() == 0
    assert (squashed[:, 0] == 255).all() and (squashed[:, -1] == 255).all() and (squashed[:, 10] == 0).all()
    assert (padded[:5] == 102).all() and (padded[15:] == 102).all() and (padded[5:15, 0] == 255).all()


def test_a_strip_does_not_fill_the_memory() -> None:
    strip = torch.zeros(3, 1, 100_000, dtype=torch.uint8)
    strip[..., 50_000] = 255
    found = Preprocessing(224, 224, "bicubic", MEAN, STD).square(strip, 224)  # without the crop: 15 GB
    assert found.shape == (3, 224, 224) and found.max() == 255


def test_the_fit_is_overridden() -> None:
    config = timm_config("resnet50.a1_in1k")
    assert [resolve(config, "", fit=fit).fit for fit in (None, *FITS)] == ["crop", *FITS]


def test_sizes_are_overridden() -> None:
    config = timm_config("resnet50.a1_in1k")  # 224 of 235
    assert (resolve(config, "").image_size, resolve(config, "").resize_size) == (224, 235)
    assert resolve(config, "", image_size=96).resize_size == int(96 / (224 / 235))  # the same share is cropped away
    assert resolve(config, "", image_size=96, resize_size=96).resize_size == 96
    assert resolve(config, "", resize_size=256).image_size == 224


def test_a_resize_below_the_crop_is_refused() -> None:
    with pytest.raises(HistoError, match=r"^--resize_size is 200, expected at least the image size, 224$"):
        resolve(timm_config("resnet50.a1_in1k"), "", resize_size=200)


@pytest.mark.parametrize("key", ["input_size", "mean", "std"])
def test_imagenet_is_never_filled_in(key: str) -> None:
    config = timm_config("resnet50.a1_in1k")
    del config.pretrained_cfg[key]
    with pytest.raises(HistoError, match=f"^backbone folder: .*declares no {key}$"):
        resolve(config, "folder")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        json.dumps({"image_processor_type": "ViTImageProcessor", "image_mean": 7}),
        json.dumps({"image_processor_type": "ViTImageProcessor", "image_std": [0, 0, 0]}),
        json.dumps({"image_processor_type": "ViTImageProcessor", "image_mean": [0.5]}),
        json.dumps({"image_processor_type": "NoSuchProcessor"}),
    ],
)
def test_a_backbone_without_a_usable_declaration(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "preprocessor_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(HistoError) as caught:
        resolve(PreTrainedConfig(), str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_an_image_processor_leaves_out(tmp_path: Path) -> None:
    processor = Preprocessing(32, 40, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "crop").image_processor()
    assert processor
    processor.do_normalize = False
    processor.save_pretrained(tmp_path)
    found = resolve(PreTrainedConfig(), str(tmp_path))
    assert (found.mean, found.std) == ((0, 0, 0), (1, 1, 1))
    processor.rescale_factor = 1.0
    processor.save_pretrained(tmp_path)
    with pytest.raises(HistoError, match=r"rescale_factor is 1\.0"):
        resolve(PreTrainedConfig(), str(tmp_path))


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(50, 71), (71, 50), (40, 40)])
def test_the_image_processor_gives_the_same_view(fit: str, shape: tuple[int, int], tmp_path: Path) -> None:
    views = Preprocessing(32, 40, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), fit)
    processor = views.image_processor()
    assert processor
    processor.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    given = AutoImageProcessor.from_pretrained(tmp_path)(PIL.Image.fromarray(image), return_tensors="pt")
    ours = views(torch.from_numpy(image).permute(2, 0, 1)[None])
    torch.testing.assert_close(given["pixel_values"], ours, rtol=0, atol=1e-6, check_stride=False)


def test_padding_has_no_image_processor() -> None:
    assert Preprocessing(32, 40, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "pad").image_processor() is None
