"""The classifier takes images in any form and says the same of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from miniature import config, write_backbone, write_data

from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.finetune import fine_tune
from hf_histo.inference import Classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = tmp_path_factory.mktemp("run")
    data = write_data(folder / "data")
    options = config(folder / "run", write_backbone(folder / "backbone"), data, "--method=linear")
    return Classifier.from_pretrained(fine_tune(options, load(data)).adapter)


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
    forms = [paths, [str(p) for p in paths], [PIL.Image.open(p) for p in paths], tensors, torch.stack(tensors),
             np.stack(arrays), tuple(arrays)]  # fmt: skip
    for form in forms:
        table = classifier(form)  # type: ignore[arg-type]
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


def test_gray_images_are_taken(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    gray = arrays[0][..., 0]
    table = classifier([gray, PIL.Image.fromarray(gray), np.stack([gray] * 3, axis=-1)])
    assert table["logit"].nunique() == 1


def test_batches_do_not_matter(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    one, three = classifier(arrays, batch_size=1), classifier(arrays, batch_size=3)
    np.testing.assert_allclose(one["logit"], three["logit"], rtol=0, atol=1e-6)


def test_the_decision_has_the_name_of_its_class(classifier: Classifier, arrays: list[np.ndarray]) -> None:
    table = classifier(arrays)
    names = classifier.sidecar.label_names
    assert list(table["predicted"]) == [names[int(p >= 0.5)] for p in table["probability"]]
    assert table["probability"].between(0, 1).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), dtype=np.float32),
        np.zeros((3, 8, 8), dtype=np.uint8),
        np.zeros((8, 8, 4), dtype=np.uint8),
        torch.zeros(3, 8, 8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
    ],
)
def test_what_is_no_image_is_refused(classifier: Classifier, image: np.ndarray | torch.Tensor) -> None:
    with pytest.raises(HistoError, match=r"image 0 .*expected uint8"):
        classifier([image])


def test_a_file_that_is_missing_or_no_image_is_named(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=r"none\.png"):
        classifier(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    with pytest.raises(HistoError, match="not a readable image"):
        classifier(tmp_path / "text.png")


def test_no_images_are_refused(classifier: Classifier) -> None:
    with pytest.raises(HistoError, match="no image"):
        classifier([])
