"""`hf_histo.json`, the sidecar of an adapter: how an image becomes a decision, validated strictly."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, ValidationInfo

from hf_histo.adapter.files import SIDECAR
from hf_histo.data import schema
from hf_histo.data.splits.checks import Composition
from hf_histo.errors import HistoError
from hf_histo.files import STRICT, read_json, write_json
from hf_histo.models import backbones, heads
from hf_histo.transforms.augmentation import SINGLE_VIEW, TestTimeViews
from hf_histo.transforms.color_shift import ColorRange
from hf_histo.transforms.pipeline import Pipeline
from hf_histo.transforms.preprocessing import Preprocessing
from hf_histo.transforms.stain import CenterNormalizer

PACKAGES = ("hf_histo", "torch", "transformers", "peft", "timm", "datasets", "accelerate")


def versions() -> dict[str, str]:
    """The versions of `PACKAGES`."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("expected names that differ")
    return names


def _one_or_all(outputs: int, info: ValidationInfo) -> int:
    classes = len(info.data.get("label_names", ()))
    if outputs not in (1, classes):
        raise ValueError(f"expected 1 or the number of classes, {classes}")
    return outputs


def _croppable(preprocessing: Preprocessing) -> Preprocessing:
    if preprocessing.image_size > preprocessing.resize_size:
        raise ValueError("expected an image_size of at most resize_size")
    return preprocessing


def _without_parents(name: str) -> str:
    if ".." in Path(name).parts:
        raise ValueError("expected a name without ..")
    return name


Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class BackboneRecord:
    """The backbone that an adapter is for.

    Attributes:
        name: name for `backbones.locate`; a local folder is an absolute path.
        revision: revision on the Hub.
        fingerprint: hash of its weights, see `backbones.fingerprint`.
        configuration: see `backbones.configuration`; None in folders of older versions.
    """

    __pydantic_config__ = STRICT

    name: Annotated[str, Field(min_length=1), AfterValidator(_without_parents)]
    revision: str | None
    fingerprint: str
    configuration: dict[str, Any] | None = None

    @property
    def title(self) -> str:
        """Its name for a reader: of a local folder, without the place on this machine."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name

    @property
    def identity(self) -> backbones.Identity:
        return backbones.Identity(self.fingerprint, self.configuration)


@dataclass(frozen=True)
class DataRecord:
    """The data that an adapter was trained and evaluated on.

    Attributes:
        name: name of the folder, file or data set.
        fingerprint: hash of the content, see `data.load.fingerprint`.
        splits: composition of each split; empty in folders of older versions.
        description: description of the files by their reader; None in folders of older versions.
        near_copies_searched: whether near copies were searched for among the images.
    """

    __pydantic_config__ = STRICT

    name: str
    fingerprint: str
    splits: dict[str, Composition] = dataclasses.field(default_factory=dict)
    description: str | None = None
    near_copies_searched: bool = False


@dataclass(frozen=True)
class Sidecar:
    """Content of `hf_histo.json`: how to turn an image into a decision with this adapter.

    Attributes:
        method: "linear", "lora", "pca" or "full"; a "full" folder holds the whole model, not an adapter.
        adapter: method of peft of a "lora" run; of a folder of an older version, "lora", also where it is DoRA.
        label_names: class names in the order of their indices.
        num_outputs: number of logits; a binary task has 1, that of the second class.
        backbone: the backbone of the adapter.
        batch_norm: "frozen" or "track".
        preprocessing: preprocessing of an evaluation view.
        normalizer: color normalization by center, or None.
        center_names: names of the training data's centers by number; none if they have numbers alone.
        views: the test-time views, whose mean logit is the prediction.
        adapt_batch_norm: whether batch-norm statistics are those of the images to predict.
        colors: color statistics of the training images; None if they were streamed, and in folders of older versions.
        threshold: smallest probability, in [0, 1], at which the second class is predicted.
        thresholds: alternatives by name, for a binary task: "validation" (best balanced accuracy on that split).
        temperature: number that logits are divided by for calibrated probabilities, fitted on the validation split (by
            which the checkpoint was chosen as well); 1 without calibration.
        update_scale: number in [0, 1] by which the trained update was multiplied (`--update_scale`); the saved weights
            are after it.
        head: configuration of the classifier.
        bare: whether transformers and peft can load it without this package; False if this package split an attention
            layer or built a CLIP model.
        data: the data that it was trained and evaluated on.
        versions: versions of the packages that trained it.
    """

    __pydantic_config__ = STRICT

    method: Annotated[str, Field(pattern="^(linear|lora|pca|full)$")]
    label_names: Annotated[list[str], Field(min_length=2), AfterValidator(_distinct)]
    num_outputs: Annotated[int, AfterValidator(_one_or_all)]
    backbone: BackboneRecord
    batch_norm: Annotated[str, Field(pattern="^(frozen|track)$")]
    preprocessing: Annotated[Preprocessing, AfterValidator(_croppable)]
    data: DataRecord
    adapter: Annotated[str, Field(pattern="^[a-z0-9_]{1,20}$")] = "lora"
    update_scale: Probability = 1.0
    head: heads.HeadConfig = dataclasses.field(default_factory=heads.HeadConfig)
    bare: bool = True
    normalizer: CenterNormalizer | None = None
    center_names: Annotated[list[str], AfterValidator(_distinct)] = dataclasses.field(default_factory=list)
    views: TestTimeViews = SINGLE_VIEW
    adapt_batch_norm: bool = False
    colors: ColorRange | None = None
    threshold: Probability = 0.5
    thresholds: dict[str, Probability] = dataclasses.field(default_factory=dict)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: versions())

    @property
    def title(self) -> str:
        """The task, for titles: the classes, or how many there are, and the data."""
        names = self.label_names
        return f"{' / '.join(names) if len(names) < 4 else f'{len(names)} classes'} on {self.data.name}"

    def require_images(self, where: str, remedy: str) -> None:
        """Raise `HistoError`, starting with `where`, for an adapter of bags where single images are needed."""
        if self.head.is_of_bags:
            raise HistoError(
                f"{where}: predicts slides or groups as a whole (--aggregation {self.head.aggregation}), expected an "
                f"adapter of single images; {remedy}"
            )

    @property
    def trained(self) -> str:
        """What was trained, for titles: the method, and for an adapter that of peft."""
        return self.adapter if self.method == "lora" else self.method

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline from stored pixels to the model's input, for predictions."""
        return Pipeline(self.preprocessing, normalizer=self.normalizer, test_time_views=self.views)

    @property
    def id2label(self) -> dict[int, str]:
        """Class name of each index, as transformers declares it; for one logit, that of the second class."""
        return dict(enumerate(self.label_names[-self.num_outputs :]))

    @property
    def beside_the_model(self) -> list[str]:
        """Steps of a `Classifier` prediction that are part of neither the model nor its preprocessing, as phrases."""
        method = self.normalizer.method if self.normalizer else None
        preparation = dataclasses.asdict(self.preprocessing.preparation)
        used = ", ".join(key for key, value in preparation.items() if value not in (False, "none"))
        parts = {
            f"the preparation of images ({used})": bool(used),
            f"normalization of each center's color ({method})": method is not None,
            f"the mean over {self.views.count} views": self.views != SINGLE_VIEW,
            "batch-norm statistics of the images at hand": self.adapt_batch_norm,
        }
        return [part for part, is_used in parts.items() if is_used]

    @classmethod
    def read(cls, folder: Path) -> Sidecar:
        """Read the sidecar of an adapter folder; fields that older versions lack get their defaults.

        Raises `HistoError` for a missing file, a value of another type or out of bounds, and an unknown key.
        """
        file = folder / SIDECAR
        try:
            content = read_json(file)
            if isinstance(content.get("data"), dict):
                content["data"].pop("counts", None)  # of an older version: images per split
            if isinstance(content.get("views"), int):  # of an older version: number of "square" views
                content["views"] = {"count": content["views"]}
            sidecar: Sidecar = TypeAdapter(cls).validate_json(json.dumps(content))
        except FileNotFoundError:
            raise HistoError(f"{folder}: holds no {SIDECAR}; expected the adapter folder of a finished run") from None
        except ValidationError as error:
            raise HistoError(f"{file}: {_first(error)}; update hf_histo, or copy the adapter again") from None
        except (OSError, ValueError, AttributeError, HistoError) as error:
            raise HistoError(f"{file}: not a description of an adapter ({type(error).__name__}: {error})") from None
        return sidecar

    def write(self, folder: Path) -> None:
        """Write the sidecar into an adapter folder; fields of a split's composition that are None are left out."""
        content = dataclasses.asdict(self) | {"normalizer": self.normalizer and self.normalizer.as_json()}
        for split, held in content["data"]["splits"].items():
            content["data"]["splits"][split] = {key: value for key, value in held.items() if value is not None}
        write_json(folder / SIDECAR, content)

    def labels_of(self, dataset: datasets.Dataset) -> list[int]:
        """Labels of a schema table as indices into `label_names`, matched by name; -1 where hidden.

        The table may declare its classes in another order, or declare further classes without images.

        Raises `HistoError` if an image has a class that the adapter does not have.
        """
        labels, declared = dataset["label"][:], dataset.features["label"]
        names = declared.names if isinstance(declared, datasets.ClassLabel) else []
        places = {names.index(name): place for place, name in enumerate(self.label_names) if name in names} | {-1: -1}
        if unknown := set(labels) - places.keys():
            found = f"the classes {names}" if names else f"the label {min(unknown)} without the name of a class"
            raise HistoError(
                f"the data has {found}, expected those of the adapter, {self.label_names}; rename the data's classes, "
                "or use an adapter that was trained on them"
            )
        return [places[label] for label in labels]

    def with_known_centers(self, dataset: datasets.Dataset) -> datasets.Dataset:
        """A schema table with the center numbers of `normalizer`: matched by name where centers have names.

        Other centers get numbers that training did not have. A number never stands for a name.
        """
        names = schema.center_names(dataset)
        if self.normalizer is None or names == self.center_names:
            return dataset
        known = {name: number for number, name in enumerate(self.center_names)} if names else {}
        first = 1 + max(len(self.center_names), *self.normalizer.centers)
        numbers = [known.get(schema.center_name(n, names), first + n) if n >= 0 else -1 for n in dataset["center"][:]]
        return dataset.remove_columns("center").add_column("center", numbers)

    def threshold_named(self, name: str | float | None) -> float:
        """The threshold called `name` in `thresholds`, or the number that `name` is; for None, the adapter's own.

        Raises `HistoError` for an unknown name or a number outside [0, 1], for more than two classes, and for
        "balanced-SPLIT" of older adapters: it predicts class 1 for half of that split's images, and is not valid for
        others.
        """
        if name is None:
            return self.threshold
        if self.num_outputs > 1:
            raise HistoError(
                f"--threshold is {name!r}, expected none: the most probable of {self.num_outputs} classes is predicted"
            )
        if isinstance(name, str) and name.startswith("balanced-"):
            raise HistoError(
                f"--threshold is {name!r}, a number from the images of an earlier split, expected one for new images: "
                "validation, a number, or --balanced of hf_histo predict (hf_histo.evaluation.thresholds.for_share)"
            )
        try:
            value = self.thresholds[name] if isinstance(name, str) and name in self.thresholds else float(name)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            known = ", ".join(key for key in self.thresholds if not key.startswith("balanced-")) or "none"
            raise HistoError(
                f"--threshold is {name!r}, expected a probability, or a name that the adapter holds: {known}"
            )
        return value


def _first(error: ValidationError) -> str:
    """The first error of pydantic in one line: field, value, and what was expected."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"])) or "the content"
    return f"{place} is {str(fault['input'])[:100]!r}, which is invalid: {fault['msg']}"
