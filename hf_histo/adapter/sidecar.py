"""`hf_histo.json`: how an adapter turns an image into a decision, parsed strictly."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, ValidationInfo

from hf_histo.data.splits.checks import Composition
from hf_histo.errors import HistoError
from hf_histo.files import STRICT, read_json, write_json
from hf_histo.models import backbones, heads
from hf_histo.transforms.augmentation import SINGLE_VIEW, TestTimeViews
from hf_histo.transforms.color_shift import ColorRange
from hf_histo.transforms.pipeline import Pipeline
from hf_histo.transforms.preprocessing import Preprocessing
from hf_histo.transforms.stain import CenterNormalizer

SIDECAR = "hf_histo.json"
PACKAGES = ("hf_histo", "torch", "transformers", "peft", "timm", "datasets", "accelerate")


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
        name: as `backbones.locate` takes it; a local folder as its absolute path.
        revision: on the Hub.
        fingerprint: of its weights, see `backbones.fingerprint`.
        configuration: see `backbones.configuration`; None in folders that are older than it.
    """

    __pydantic_config__ = STRICT

    name: Annotated[str, Field(min_length=1), AfterValidator(_without_parents)]
    revision: str | None
    fingerprint: str
    configuration: dict[str, Any] | None = None

    @property
    def identity(self) -> backbones.Identity:
        return backbones.Identity(self.fingerprint, self.configuration)


@dataclass(frozen=True)
class DataRecord:
    """The data that an adapter was trained and evaluated on.

    Attributes:
        name: of the folder, file or data set.
        fingerprint: of the content, see `data.load.fingerprint`.
        splits: composition of each; empty in folders that are older than it.
        description: of the files, by their reader; None in folders that are older than it.
        near_copies_searched: whether near copies were looked for among the images.
    """

    __pydantic_config__ = STRICT

    name: str
    fingerprint: str
    splits: dict[str, Composition] = dataclasses.field(default_factory=dict)
    description: str | None = None
    near_copies_searched: bool = False


@dataclass(frozen=True)
class Sidecar:
    """What `hf_histo.json` holds: how to turn an image into a decision with this adapter.

    Attributes:
        method: "linear", "lora", "pca" or "full"; a "full" folder holds the whole model, not an adapter.
        label_names: classes in the order of their indices.
        num_outputs: logits of the head; 1 for a binary task, that of the second class.
        backbone: that the adapter is for.
        batch_norm: "frozen" or "track".
        preprocessing: of an evaluation image.
        normalizer: of the centers' color, or None.
        views: whose mean logit is a prediction.
        adapt_batch_norm: whether a prediction takes batch-norm statistics from its own images.
        colors: of the training images; None where they were streamed, and in folders that are older than it.
        threshold: probability of the second class from which on it is predicted, in [0, 1].
        thresholds: others to choose from by name, for a binary task: "validation" (best balanced accuracy there).
        temperature: by which logits are divided before they become calibrated probabilities, fitted on the validation
            split, where the checkpoint was chosen, too; 1 without calibration.
        head: what the classifier is made of.
        bare: transformers and peft alone can load it; False where this package took attention or a CLIP model apart.
        data: that it was trained and evaluated on.
        versions: of the packages that trained it.
    """

    __pydantic_config__ = STRICT

    method: Annotated[str, Field(pattern="^(linear|lora|pca|full)$")]
    label_names: Annotated[list[str], Field(min_length=2), AfterValidator(_distinct)]
    num_outputs: Annotated[int, AfterValidator(_one_or_all)]
    backbone: BackboneRecord
    batch_norm: Annotated[str, Field(pattern="^(frozen|track)$")]
    preprocessing: Annotated[Preprocessing, AfterValidator(_croppable)]
    data: DataRecord
    head: heads.HeadConfig = dataclasses.field(default_factory=heads.HeadConfig)
    bare: bool = True
    normalizer: CenterNormalizer | None = None
    views: TestTimeViews = SINGLE_VIEW
    adapt_batch_norm: bool = False
    colors: ColorRange | None = None
    threshold: Probability = 0.5
    thresholds: dict[str, Probability] = dataclasses.field(default_factory=dict)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in PACKAGES}
    )

    @property
    def pipeline(self) -> Pipeline:
        """From stored pixels to the model's input, for predictions."""
        return Pipeline(self.preprocessing, normalizer=self.normalizer, test_time_views=self.views)

    @property
    def id2label(self) -> dict[int, str]:
        """Class of each logit."""
        return dict(enumerate(self.label_names[-self.num_outputs :]))

    @property
    def beside_the_model(self) -> list[str]:
        """What decides a prediction of `Classifier` and is no part of the model or of its preprocessing, in words."""
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
        """Read it from an adapter folder; what older ones lack has its default.

        Raises `HistoError` if it is missing, or for a value of another type or out of its bounds, and a key that is
        unknown.
        """
        file = folder / SIDECAR
        try:
            content = read_json(file)
            if isinstance(content.get("data"), dict):
                content["data"].pop("counts", None)  # before the composition of splits: the images of each
            if isinstance(content.get("views"), int):  # before views could be drawn: a number of those of the square
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
        """Write it into an adapter folder; what a split's composition lacks is left out."""
        content = dataclasses.asdict(self) | {"normalizer": self.normalizer and self.normalizer.as_json()}
        for split, held in content["data"]["splits"].items():
            content["data"]["splits"][split] = {key: value for key, value in held.items() if value is not None}
        write_json(folder / SIDECAR, content)

    def labels_of(self, dataset: datasets.Dataset) -> list[int]:
        """The labels of a schema table as indices into `label_names`, matched by name; -1 where they are hidden.

        The table may declare its classes in another order, or more of them than its images have.

        Raises `HistoError` where an image has a class that the adapter does not know.
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

    def threshold_named(self, name: str | float | None) -> float:
        """The threshold of that name in `thresholds`, or the number that `name` is or spells; None: the adapter's own.

        Raises `HistoError` for an unknown name or a number outside [0, 1], for more than two classes, and for
        "balanced-SPLIT", which older adapters hold: it called half of the images of that split positive, and no half of
        others.
        """
        if name is None:
            return self.threshold
        if self.num_outputs > 1:
            raise HistoError(
                f"--threshold is {name!r}, expected none: of {self.num_outputs} classes the likeliest is predicted"
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
    """What pydantic found first, in a line: where, what, and what was expected."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"])) or "the content"
    return f"{place} is {str(fault['input'])[:100]!r}, which is invalid: {fault['msg']}"
