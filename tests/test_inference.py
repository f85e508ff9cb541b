"""The classifier takes images in any form and predicts the same for each."""

from __future__ import annotations

import copy
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import PIL.ExifTags
import PIL.Image
import pytest
import torch
import transformers
from miniature import SIZE, config, write_adapter, write_backbone, write_data, write_hf_vit
from packaging.version import Version
from scipy.special import expit, softmax
from torch import nn
from transformers import pipeline

from hf_histo import inference
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import AdapterOptions
from hf_histo.data.load import load
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration, thresholds
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.finetune import run_config
from hf_histo.hub import load as load_adapter
from hf_histo.inference import Classifier
from hf_histo.models import adapters
from hf_histo.models.heads import HeadConfig
from hf_histo.transforms.augmentation import TestTimeViews
from hf_histo.transforms.preprocessing import Preprocessing
from hf_histo.transforms.stain import CenterNormalizer, Statistics


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = write_data(folder / "data")
    run_config(
        config(folder / "run", write_backbone(folder / "backbone"), data, "--method=linear", "--explain"), load(data)
    )
    return folder


@pytest.fixture(scope="module")
def classifier(run: Path) -> Classifier:
    return Classifier.from_pretrained(run / "run" / "adapter")


@pytest.fixture
def arrays() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8))


def test_every_form_of_an_image_gives_the_same(
    classifier: Classifier, arrays: list[np.ndarray], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        PIL.Image.fromarray(array).save(path)
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    expected = classifier(arrays)
    assert expected["logit"].nunique() == 3
    assert list(expected["id"]) == ["0", "1", "2"]
    column = datasets.Dataset.from_dict(
        {"scan": [str(path) for path in paths]}, features=datasets.Features({"scan": datasets.Image()})
    )["scan"]
    mixture = [tensors[0].permute(1, 2, 0), tensors[1].numpy(), paths[2]]
    floats = [np.stack(arrays) / 255, torch.stack(tensors).half() / 255]
    opened = [PIL.Image.open(path) for path in paths]
    forms: list[Any] = [paths, [str(path) for path in paths], opened, column, mixture, *floats]
    for form in [*forms, tensors, torch.stack(tensors), np.stack(arrays), tuple(arrays)]:
        table = classifier(form)
        assert len(table) == 3
        np.testing.assert_allclose(table["logit"], expected["logit"], rtol=0, atol=1e-6)
    assert list(classifier(paths)["id"]) == [str(path) for path in paths]


def test_one_image_is_a_table_of_one_row(classifier: Classifier, arrays: list[np.ndarray], tmp_path: Path) -> None:
    PIL.Image.fromarray(arrays[1]).save(tmp_path / "one.png")
    expected = classifier(arrays)["logit"][1]
    tensor = torch.from_numpy(arrays[1]).permute(2, 0, 1)
    for one in (arrays[1], tensor, PIL.Image.fromarray(arrays[1]), tmp_path / "one.png", str(tmp_path / "one.png")):
        table = classifier(one)
        assert len(table) == 1
        assert table["logit"][0] == pytest.approx(expected, abs=1e-6)


def test_images_of_different_sizes_are_taken_together(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    mixed = [arrays[0], arrays[1][:33], arrays[2][:, 5:]]
    together = classifier(mixed)["logit"]
    np.testing.assert_allclose(together, [classifier(one)["logit"][0] for one in mixed], rtol=0, atol=1e-5)


def test_gray_images_are_taken(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    gray = arrays[0][..., 0]
    table = classifier([gray, PIL.Image.fromarray(gray), np.stack([gray] * 3, axis=-1)])
    np.testing.assert_allclose(table["logit"], table["logit"][0], rtol=0, atol=1e-6)


def test_batches_do_not_matter(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    one, three = classifier(arrays, batch_size=1), classifier(arrays, batch_size=3)
    np.testing.assert_allclose(one["logit"], three["logit"], rtol=0, atol=1e-6)


def test_large_images_come_in_smaller_batches(
    classifier: Classifier, arrays: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    hook = classifier.model.register_forward_pre_hook(
        lambda _, args, options: seen.append(len(options["pixel_values"])), with_kwargs=True
    )
    expected = classifier(arrays)["logit"]
    monkeypatch.setattr(inference, "BATCH_PIXELS", 2 * SIZE**2)
    np.testing.assert_allclose(classifier(arrays)["logit"], expected, rtol=0, atol=1e-6)
    hook.remove()
    assert seen == [3, 2, 1]


def test_the_decision_has_the_name_of_its_class(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    table = classifier(arrays)
    names = classifier.sidecar.label_names
    assert list(table["predicted"]) == [names[int(p >= 0.5)] for p in table["probability"]]
    assert table["probability"].between(0, 1).all()


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((8, 8, 4), dtype=np.uint8), r"shape \(8, 8, 4\)"),
        (np.zeros((3, 8, 3), dtype=np.uint8), "two ways"),
        (np.zeros((8, 0, 3), dtype=np.uint8), "no image"),
        (np.zeros(8, dtype=np.uint8), "no image"),
        (np.zeros((8, 8, 3), dtype=np.int64), "is int64"),
        (np.full((8, 8, 3), 255.0), "from 255 to 255"),
        (np.full((8, 8, 3), np.nan), "from nan"),
        (torch.full((3, 8, 8), -0.5), "from -0.5"),
        (7, "of type int"),
        ("none.png", "can't be read"),
    ],
)
def test_what_is_no_image_is_refused(classifier: Classifier, image: Any, found: str) -> None:
    with pytest.raises(HistoError, match=f"^(image 1|none.png).*{found}.*expected"):
        classifier([np.zeros((8, 8, 3), dtype=np.uint8), image])


def test_what_holds_no_images_is_refused(classifier: Classifier) -> None:
    with pytest.raises(HistoError, match=r"^images is a NoneType; expected one or several images"):
        classifier(None)
    with pytest.raises(HistoError, match=r"^center is 9223372036854775808, expected the number of a center"):
        classifier(np.zeros((8, 8, 3), dtype=np.uint8), center=2**63)


def test_half_precision_tensors_are_taken(classifier: Classifier) -> None:
    image = torch.rand(3, 40, 40)
    for kind in (torch.bfloat16, torch.float16):
        found, expected = classifier(image.to(kind)), classifier(image.to(kind).float())
        assert found["logit"].tolist() == expected["logit"].tolist()


@pytest.mark.parametrize("bits", [None, 12])
def test_deep_and_turned_images_are_read_alike_in_every_form(
    classifier: Classifier, tmp_path: Path, bits: int | None
) -> None:
    preprocessing = replace(classifier.sidecar.preprocessing, gray_bits=bits)
    deep = Classifier(classifier.model, replace(classifier.sidecar, preprocessing=preprocessing))
    gray = np.random.default_rng(0).integers(0, 4096, (40, 48), dtype=np.uint16)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    PIL.Image.fromarray(gray).save(tmp_path / "gray.png", exif=exif)
    expected = np.rot90((gray >> 4).astype(np.uint8), -1)
    with PIL.Image.open(tmp_path / "gray.png") as image:
        loaded = image.copy()
        turned = PIL.Image.fromarray(gray).transpose(PIL.Image.Transpose.ROTATE_270)
        for form in (tmp_path / "gray.png", image, loaded, turned):
            if bits is None:
                with pytest.raises(HistoError, match=r"(gray\.png|image 0): 16-bit gray of unknown range"):
                    deep(form)
            else:
                assert deep(form)["logit"].tolist() == deep(expected)["logit"].tolist()
    loaded.putpixel((0, 0), 4096)
    if bits:
        with pytest.raises(HistoError, match=r"^image 0: value 4096 in 16-bit gray, expected at most 4095"):
            deep(loaded)


@pytest.mark.parametrize("own", [None, 12, 16])
def test_a_data_set_read_with_other_bits_is_refused(classifier: Classifier, tmp_path: Path, own: int | None) -> None:
    for i, name in enumerate(classifier.sidecar.label_names):
        (tmp_path / "data" / name).mkdir(parents=True)
        gray = np.random.default_rng(i).integers(0, 4096, (40, 40), dtype=np.uint16)
        PIL.Image.fromarray(gray).save(tmp_path / "data" / name / "a.png")
    data = load(tmp_path / "data", cache_dir=tmp_path / "cache")["full"]
    preprocessing = replace(classifier.sidecar.preprocessing, gray_bits=own)
    deep = Classifier(classifier.model, replace(classifier.sidecar, preprocessing=preprocessing))
    if own == 12:
        assert len(deep.predict(data)) == 2
    else:
        remedy = "give --gray_bits 16" if own else "convert them to 8 bits"
        with pytest.raises(HistoError, match=f"^16-bit gray images .* of 12 bits, expected {own or 8}.*{remedy}"):
            deep.predict(data)


def test_a_run_on_deep_images_reads_others_as_it_read_those(run: Path, tmp_path: Path) -> None:
    for i in range(16):
        folder = tmp_path / "data" / ("train", "val")[i // 8] / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        gray = np.random.default_rng(i).integers(0, 2048 * (1 + i % 2), (40, 40), dtype=np.uint16)
        PIL.Image.fromarray(gray).save(folder / f"{i}.png")
    options = config(tmp_path / "run", run / "backbone", tmp_path / "data", "--method=linear")
    adapter = run_config(options, load(tmp_path / "data", cache_dir=tmp_path / "cache")).adapter
    classifier = Classifier.from_pretrained(adapter)
    assert classifier.sidecar.preprocessing.gray_bits == 12
    assert classifier(tmp_path / "data/val/dark/14.png")["id"].tolist() == [str(tmp_path / "data/val/dark/14.png")]
    dark = np.random.default_rng(0).integers(0, 200, (40, 40), dtype=np.uint16)  # which is not stretched to white
    PIL.Image.fromarray(dark).save(tmp_path / "dark.png")
    expected = classifier((dark >> 4).astype(np.uint8))["logit"]
    assert classifier(tmp_path / "dark.png")["logit"].tolist() == expected.tolist()


def test_a_pipe_is_refused_before_it_is_opened(classifier: Classifier, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    for name in ("pipe.png", "link.png"):
        with pytest.raises(HistoError, match=rf"{name}: a pipe, expected a file"):
            classifier(tmp_path / name)


def test_a_file_that_is_missing_or_no_image_is_named(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=r"none\.png"):
        classifier(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    with pytest.raises(HistoError, match="not a readable image"):
        classifier(tmp_path / "text.png")


def test_no_images_are_refused(classifier: Classifier) -> None:
    for nothing in ([], np.zeros((0, 8, 8, 3), dtype=np.uint8)):
        with pytest.raises(HistoError, match="no image"):
            classifier(nothing)


def test_a_file_and_a_table_keep_their_ids_and_centers(classifier: Classifier, run: Path) -> None:
    file = classifier(run / "data" / "test.h5")
    data = load(run / "data")["test"]
    table = classifier(data)
    for found in (file, table, classifier(str(run / "data" / "test.h5"))):
        assert list(found["id"]) == data["id"]
        assert list(found["center"]) == data["center"]
        np.testing.assert_array_equal(found["logit"], table["logit"])
    with pytest.raises(HistoError, match=r"columns \['image'\], but no id"):
        classifier(data.select_columns("image"))


def test_a_table_of_paths(classifier: Classifier, arrays: list[np.ndarray], tmp_path: Path) -> None:
    paths = [tmp_path / f"{place}.png" for place in range(len(arrays))]
    for path, pixels in zip(paths, arrays, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    frame = pd.DataFrame({"image": paths, "hospital": "Halle"})
    frame.assign(image=[path.name for path in paths]).to_csv(tmp_path / "images.csv", index=False)
    for found in (classifier(frame), classifier(tmp_path / "images.csv")):
        np.testing.assert_array_equal(found["logit"], classifier(arrays)["logit"])
        assert list(found["id"]) == ["0.png", "1.png", "2.png"]
        assert found.center_names == ["Halle"]
    with pytest.raises(HistoError, match=r"has the splits train, test, expected one; pass one of them"):
        classifier(frame.assign(label=["normal", "tumor", "normal"], split=["train", "train", "test"]))


def test_probabilities_of_the_classes(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    table, found = classifier(arrays), classifier.probabilities(arrays)
    assert list(found.columns) == classifier.sidecar.label_names and list(found.index) == ["0", "1", "2"]
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found.iloc[:, 1], table["calibrated"])


def test_how_a_classifier_is_shown(classifier: Classifier) -> None:
    assert repr(classifier).startswith("Classifier(linear on ")
    assert repr(classifier).endswith(": " + ", ".join(classifier.sidecar.label_names) + ")")


def reordered(data: datasets.Dataset, names: list[str]) -> datasets.Dataset:
    """The same labeled images by a source that declares its classes in the order `names`."""
    old = data.features["label"].names
    labels = [names.index(old[label]) if label >= 0 else -1 for label in data["label"]]
    rows = data.remove_columns("label").add_column("label", labels)
    return rows.cast_column("label", datasets.ClassLabel(names=names))


def test_labels_are_those_of_the_adapter_by_their_names(classifier: Classifier, run: Path) -> None:
    data = load(run / "data")["val"]
    expected = classifier.predict(data)
    assert set(expected["label"]) == {0, 1}
    for names in (["tumor", "normal"], ["another", "tumor", "normal"]):
        found = classifier.predict(reordered(data, names))
        assert list(found["label"]) == list(expected["label"])
        assert classification.report(found)["overall"] == classification.report(expected)["overall"]


def test_labels_of_classes_that_the_adapter_does_not_know_are_refused(classifier: Classifier, run: Path) -> None:
    data = load(run / "data")["val"]
    other = data.cast_column("label", datasets.ClassLabel(names=["benign", "tumor"]))
    with pytest.raises(HistoError, match=r"\['benign', 'tumor'\].*expected.*\['normal', 'tumor'\]"):
        classifier.predict(other)
    numbers = data.cast_column("label", datasets.Value("int64"))
    with pytest.raises(HistoError, match=r"label.*expected.*\['normal', 'tumor'\]"):
        classifier.predict(numbers)
    hidden = other.remove_columns("label").add_column("label", [-1] * len(other)).cast(other.features)
    assert hidden.features["label"].names == ["benign", "tumor"]
    assert set(classifier.predict(hidden)["label"]) == {-1}


def test_the_threshold_by_name_and_by_number(classifier: Classifier, run: Path) -> None:
    file = run / "data" / "test.h5"
    names = classifier.sidecar.label_names
    for name, value in classifier.sidecar.thresholds.items():
        table = classifier(file, threshold=name)
        assert list(table["predicted"]) == [names[int(p >= value)] for p in table["probability"]]
    validation = Predictions.read(run / "run" / "adapter" / "predictions" / "val.parquet")
    assert classifier.sidecar.thresholds == {"validation": thresholds.choose(validation).value}
    assert set(classifier(file, threshold=0.0)["predicted"]) == {names[1]}
    assert set(classifier(file, threshold=1)["predicted"]) == {names[0]}
    for wrong in ("moon", 1.5, float("nan")):
        with pytest.raises(HistoError, match=r"--threshold is .*validation"):
            classifier(file, threshold=wrong)


def test_several_classes_have_no_threshold(classifier: Classifier) -> None:
    sidecar = replace(classifier.sidecar, label_names=["a", "b", "c"], num_outputs=3, thresholds={})
    assert sidecar.threshold_named(None) == 0.5
    with pytest.raises(
        HistoError, match=r"--threshold is 0\.3, expected none: the most probable of 3 classes is predicted"
    ):
        sidecar.threshold_named(0.3)


def test_a_threshold_that_balanced_other_images_is_refused(classifier: Classifier, run: Path) -> None:
    older = replace(classifier.sidecar, thresholds={"validation": 0.4, "balanced-test": 0.3})
    with pytest.raises(HistoError, match=r"'balanced-test', a number from the images of an earlier split.*--balanced"):
        Classifier(classifier.model, older)(run / "data" / "test.h5", threshold="balanced-test")


def test_what_was_measured_on_the_images_themselves_is_recorded(classifier: Classifier, run: Path) -> None:
    data = load(run / "data")
    seen, unseen = (data[split].select(range(3)) for split in ("train", "test"))
    for rows in (seen, unseen):
        assert classifier.predict(rows).attrs["transductive"] == []
        adapted = classifier.predict(rows, adapt_batch_norm=True)
        assert adapted.attrs["transductive"] == ["batch-norm statistics"]
    normalizer = CenterNormalizer.fit(ImageTable(data["train"]), "rgb")
    normalized = Classifier(classifier.model, replace(classifier.sidecar, normalizer=normalizer))
    assert normalized.predict(seen).attrs["transductive"] == []
    assert normalized.predict(unseen).attrs["transductive"] == ["color statistics"]


def test_the_temperature_is_that_of_validation_and_changes_no_decision(classifier: Classifier, run: Path) -> None:
    validation = Predictions.read(run / "run" / "adapter" / "predictions" / "val.parquet")
    fitted = calibration.fit_temperature(validation)
    assert classifier.sidecar.temperature == pytest.approx(fitted.value)
    hot = Classifier(classifier.model, replace(classifier.sidecar, temperature=3.0))
    table, other = classifier(run / "data" / "test.h5"), hot(run / "data" / "test.h5")
    np.testing.assert_allclose(other["calibrated"], expit(table["logit"] / 3), rtol=1e-12)
    for column in ("logit", "probability", "predicted"):
        assert list(table[column]) == list(other[column])


def test_the_temperature_of_many_classes_keeps_the_class(tmp_path: Path) -> None:
    def sidecar(temperature: float) -> Sidecar:
        views = Preprocessing(8, 8, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return Sidecar("linear", ["a", "b", "c"], 3, {}, "frozen", views, {}, temperature=temperature)

    class Means(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=pixel_values.mean((2, 3)))

    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    plain, cold = (Classifier(Means(), sidecar(t))(images) for t in (1.0, 0.01))
    assert plain["predicted"].nunique() > 1
    assert list(plain["predicted"]) == list(cold["predicted"])
    logits = plain.logits
    np.testing.assert_allclose(np.stack(cold["calibrated"]), softmax(logits / 0.01, axis=1), rtol=1e-9)
    np.testing.assert_allclose(np.stack(plain["calibrated"]), plain.probabilities, rtol=1e-12)


def test_a_known_center_has_its_stored_color_and_another_one_is_measured(
    run: Path, classifier: Classifier, arrays: list[np.ndarray]
) -> None:
    normalizer = CenterNormalizer.fit(ImageTable(load(run / "data")["train"]), "rgb")
    centered = Classifier(classifier.model, replace(classifier.sidecar, normalizer=normalizer))
    known, other = (centered(arrays, center=center)["logit"] for center in (normalizer.training[0], 77))
    assert not np.allclose(known, other, atol=1e-4)
    one = [centered(array, center=normalizer.training[0])["logit"][0] for array in arrays]
    np.testing.assert_allclose(one, known, rtol=0, atol=1e-5)  # it does not depend on what comes with it
    np.testing.assert_allclose(centered(arrays)["logit"], other, rtol=0, atol=1e-6)  # an unknown one is measured, too
    darker = [array // 2 for array in arrays]  # the same images of a darker scanner
    np.testing.assert_allclose(centered(darker, center=77)["logit"], other, rtol=0, atol=0.02)


def test_the_device_is_the_one_that_was_asked_for(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    on_cpu = Classifier(classifier.model, classifier.sidecar).to("cpu")
    np.testing.assert_array_equal(on_cpu(arrays)["logit"], classifier(arrays)["logit"])
    with pytest.raises(NotImplementedError, match="meta"):  # it went there: nothing can be read back from it
        Classifier(copy.deepcopy(classifier.model), classifier.sidecar).to("meta")(arrays)


@pytest.fixture(scope="module")
def backbones(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A convolutional network, and vision transformers: of timm, made for larger images, and of transformers."""
    folder = tmp_path_factory.mktemp("backbones")
    return {
        "timm-resnet": run / "backbone",
        "timm-vit": write_backbone(folder / "timm-vit", "test_vit.r160_in1k"),
        "hf-vit": write_hf_vit(folder / "hf-vit"),
    }


def lora_of(backbone: str) -> AdapterOptions:
    return AdapterOptions(target_modules="last-conv" if backbone == "timm-resnet" else "attention-qkvo")


@pytest.mark.parametrize("backbone", ["timm-resnet", "timm-vit", "hf-vit"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_pipeline_of_the_card_predicts_the_same(
    backbones: dict[str, Path], arrays: list[np.ndarray], tmp_path: Path, outputs: int, backbone: str
) -> None:
    lora = lora_of(backbone)
    folder = write_adapter(tmp_path / "adapter", backbones[backbone], outputs=outputs, lora=lora)
    PIL.Image.fromarray(arrays[0]).save(tmp_path / "patch.png")
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    bare = "\n".join(block for block in blocks if "Classifier" not in block)
    bare = bare.replace("THIS_FOLDER", str(folder)).replace("patch.png", str(tmp_path / "patch.png"))
    names: dict[str, Any] = {"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}
    exec(bare, names)
    table = Classifier.from_pretrained(folder)(arrays)
    for array, probability in zip(arrays, table["probability"], strict=True):
        predicted = {entry["label"]: entry["score"] for entry in names["classify"](PIL.Image.fromarray(array))}
        labels = table.attrs["label_names"]
        expected = {"tumor": probability} if outputs == 1 else dict(zip(labels, probability, strict=True))
        assert predicted == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="this version only warns")
def test_a_pipeline_of_the_folder_alone_is_refused(run: Path, tmp_path: Path) -> None:
    """As the card states: transformers builds the backbone with its own classes, and does not predict with those."""
    folder = write_adapter(tmp_path / "adapter", run / "backbone")
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        pipeline("image-classification", model=str(folder))


def write_pair(run: Path, folder: Path, **options: Any) -> list[Path]:
    """Two adapters on the same layers, of different weights, ranks and scales."""
    designs = (AdapterOptions(target_modules="last-conv"), AdapterOptions(target_modules="last-conv", lora_rank=4,
        lora_alpha=3.0, use_rslora=True))  # fmt: skip
    return [
        write_adapter(folder / f"adapter{i}", run / "backbone", seed=i, lora=lora, **options)
        for i, lora in enumerate(designs)
    ]


def test_several_adapters_on_one_backbone(run: Path, arrays: list[np.ndarray], tmp_path: Path) -> None:
    pair = write_pair(run, tmp_path)
    alone = [Classifier.from_pretrained(folder)(arrays)["logit"].to_numpy() for folder in pair]
    assert not np.allclose(*alone, atol=1e-3)
    both = Classifier.from_pretrained(pair[0])
    backbone = both.model.get_base_model().timm_model.conv1[0].weight
    both.load_adapter(pair[1], "b")
    np.testing.assert_allclose(both(arrays)["logit"], alone[1], rtol=0, atol=1e-5)
    both.set_adapter("default")
    np.testing.assert_allclose(both(arrays)["logit"], alone[0], rtol=0, atol=1e-5)
    assert both.model.get_base_model().timm_model.conv1[0].weight is backbone
    with pytest.raises(HistoError, match="'c' is not loaded, expected one of default, b"):
        both.set_adapter("c")


@pytest.mark.parametrize("head", [HeadConfig(), HeadConfig(widths=(5,))])
def test_the_mean_of_adapters_is_the_model_of_the_mean_weights(
    run: Path, arrays: list[np.ndarray], tmp_path: Path, head: HeadConfig
) -> None:
    pair = write_pair(run, tmp_path, head=head)
    several = Classifier.from_pretrained(pair[0])
    several.load_adapter(pair[1], "b")
    several.average(["default", "b"])
    found = several(arrays)["logit"]

    merged = [adapters.merged(load_adapter(folder)[0]).state_dict() for folder in pair]
    model = adapters.merged(load_adapter(pair[0])[0])
    model.load_state_dict({key: (merged[0][key] + merged[1][key]) / 2 for key in merged[0]})
    expected = Classifier(model, several.sidecar)(arrays)["logit"]
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    several.set_adapter("b")  # the parts are what they were
    np.testing.assert_allclose(
        several(arrays)["logit"], Classifier.from_pretrained(pair[1])(arrays)["logit"], atol=1e-5
    )


def test_adapters_that_can_not_be_combined(run: Path, tmp_path: Path) -> None:
    first = write_adapter(tmp_path / "first", run / "backbone")
    classifier = Classifier.from_pretrained(first)
    others = {
        "another backbone": write_adapter(tmp_path / "other", write_backbone(tmp_path / "backbone", seed=5)),
        r"classes is \['a', 'b'\]": write_adapter(tmp_path / "names", run / "backbone", label_names=["a", "b"]),
        "head is hidden": write_adapter(tmp_path / "head", run / "backbone", head=HeadConfig(widths=(5,))),
        "batch norm is track": write_adapter(tmp_path / "track", run / "backbone", batch_norm="track"),
    }
    for message, folder in others.items():
        with pytest.raises(HistoError, match=message):
            classifier.load_adapter(folder, "b")
    with pytest.raises(HistoError, match="without dots"):
        classifier.load_adapter(first, "a.b")
    dora = write_adapter(
        tmp_path / "dora", run / "backbone", lora=AdapterOptions(target_modules="last-conv", adapter="dora")
    )
    classifier.load_adapter(dora, "dora")
    with pytest.raises(HistoError, match="DoRA"):
        classifier.average(["default", "dora"])
    classifier.load_adapter(write_adapter(tmp_path / "views", run / "backbone", views=TestTimeViews(8)), "views")
    with pytest.raises(HistoError, match="differ in views"):
        classifier.average(["default", "views"])
    linear = write_adapter(tmp_path / "linear", run / "backbone", lora=AdapterOptions(method="linear"))
    classifier.load_adapter(linear, "linear")
    with pytest.raises(HistoError, match="different layers"):
        classifier.average(["default", "linear"])


def test_a_map_lies_on_the_pixels_of_its_image(
    classifier: Classifier, arrays: list[np.ndarray], tmp_path: Path
) -> None:
    tall = np.concatenate([arrays[0]] * 2)
    maps = classifier.explain([arrays[0], tall], [1, 0])
    assert [heat.shape for heat in maps] == [arrays[0].shape[:2], tall.shape[:2]]
    assert all(heat.min() >= 0 and heat.max() <= 1 for heat in maps)
    assert maps[1][:10].max() == 0  # the center crop does not see the ends


def test_the_color_of_a_center_is_measured_on_all_images_for_a_few_maps(run: Path, tmp_path: Path) -> None:
    normalizer = CenterNormalizer("rgb", Statistics((0.5,) * 3, ((0.2, 0, 0), (0, 0.2, 0), (0, 0, 0.2))), {}, ())
    classifier = Classifier.from_pretrained(
        write_adapter(tmp_path / "adapter", run / "backbone", normalizer=normalizer)
    )
    data = load(run / "data")["test"]
    every = classifier.explain(data, [1] * len(data))
    (chosen,) = classifier.explain(data, [1], rows=[3])
    assert (chosen == every[3]).all()
    assert not np.allclose(chosen, classifier.explain(data.select([3]), [1])[0])


def test_the_figure_of_explanations(classifier: Classifier, run: Path, tmp_path: Path) -> None:
    assert (run / "run" / "adapter" / "figures" / "explanations.png").is_file()
    data = load(run / "data")["test"]
    classifier.draw(data, classifier.predict(data), tmp_path / "explanations.png")
    assert PIL.Image.open(tmp_path / "explanations.png").size[0] > 1000
