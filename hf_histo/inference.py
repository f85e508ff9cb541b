"""Prediction on new images with nothing but an adapter folder and its backbone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import torch
from numpy.typing import ArrayLike, NDArray
from peft import PeftModel
from torch import nn

from hf_histo.adapter import ensemble
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.data import bags, schema
from hf_histo.data.load import load as load_data
from hf_histo.data.readers.image_rows import SUFFIXES
from hf_histo.data.reading import Reading
from hf_histo.data.schema import ImageTable
from hf_histo.errors import HistoError, printable
from hf_histo.evaluation import ensembling, prediction_sets, predictions
from hf_histo.evaluation.figures.explanation import explanations, heat_map
from hf_histo.evaluation.figures.style import short
from hf_histo.evaluation.forward import forward
from hf_histo.evaluation.prediction_sets import PredictionSets
from hf_histo.evaluation.predictions import Predictions
from hf_histo.files import regular
from hf_histo.hub import fetch, load
from hf_histo.models import adapters, backbones, heads
from hf_histo.training.run_folder import PREDICTIONS
from hf_histo.transforms.augmentation import TestTimeViews
from hf_histo.transforms.pipeline import collate

HDF5 = (".h5", ".hdf5")
BATCH_PIXELS = 64 * 384 * 384  # that a model sees at a time: an adapter's image size must not decide over the memory

Image = str | Path | PIL.Image.Image | np.ndarray | torch.Tensor
Images: TypeAlias = Image | Sequence[Image] | pd.DataFrame | datasets.Dataset


@dataclass(frozen=True)
class PatchPredictions:
    """What an adapter of bags found in n images.

    Attributes:
        probabilities: float64 (n, K), of each image as if it were a bag alone.
        attention: float64 (n,), the weight of each image in its bag, in [0, 1] with a sum of 1; None without attention.
    """

    probabilities: NDArray[np.float64]
    attention: NDArray[np.float64] | None


class Classifier:
    """A trained model with all that turns an image into a decision.

    Examples:
        >>> classifier = Classifier.from_pretrained("runs/demo/adapter")
        >>> classifier(["a.png", "b.png"])  # a predictions table
        >>> classifier("hospital.h5", threshold="validation")
        >>> classifier.probabilities(["a.png", "b.png"])  # a column for each class
    """

    def __init__(self, model: nn.Module, sidecar: Sidecar, folder: Path | None = None) -> None:
        self.model = model
        self.name = "default"  # of the adapter in use
        self.sidecars = {self.name: sidecar}
        self.folders = {self.name: folder}
        self._device: torch.device | None = None

    @property
    def sidecar(self) -> Sidecar:
        """The sidecar of the adapter in use."""
        return self.sidecars[self.name]

    def __repr__(self) -> str:
        known, sidecar = "".join(f", adapter {name!r}" for name in [*self.sidecars][1:]), self.sidecar
        classes = ", ".join(sidecar.label_names)
        return printable(f"Classifier({sidecar.trained} on {sidecar.backbone.name}: {classes}{known})")

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, backbone: str | None = None
    ) -> Classifier:
        """From an adapter folder, a folder of an ensemble, or a Hub name; see `hf_histo.hub.load`."""
        folder = fetch(source, revision)
        if ensemble.is_ensemble(folder):
            return Ensemble.from_folder(folder, backbone=backbone)
        model, sidecar = load(folder, backbone=backbone)
        return cls(model, sidecar, folder)

    def load_adapter(
        self, source: str | Path, name: str, *, revision: str | None = None, backbone: str | None = None
    ) -> None:
        """Put another adapter on the same backbone, beside those that are there, and use it from now on.

        Raises `HistoError` if it is of another backbone, other classes, another head or input size, or if one of the
        two moved the batch-norm statistics, which are the backbone's.
        """
        # By way of a model of its own, so that an adapter passes the same checks however it comes.
        folder = fetch(source, revision)
        other, sidecar = load(folder, backbone=backbone)
        if not (isinstance(self.model, PeftModel) and isinstance(other, PeftModel)):
            raise HistoError(f"{source}: method full has no adapter to share a backbone; expected linear or lora")
        if difference := backbones.difference(self.sidecar.backbone.identity, sidecar.backbone.identity):
            raise HistoError(f"{source}: is of another backbone than the first, {difference}, expected the same one")
        for what, ours, its in (
            ("classes", self.sidecar.label_names, sidecar.label_names),
            ("head", self.sidecar.head, sidecar.head),
            ("input size", self.sidecar.preprocessing.image_size, sidecar.preprocessing.image_size),
            ("batch norm", "frozen", sidecar.batch_norm),
            ("batch norm of the first", "frozen", self.sidecar.batch_norm),
        ):
            if ours != its:
                raise HistoError(f"{source}: {what} is {its}, expected {ours}, to share a backbone")
        adapters.join(self.model, other, name)
        self.name, self.sidecars[name], self.folders[name] = name, sidecar, folder

    def set_adapter(self, name: str) -> None:
        """Use the adapter of that name, "default" being the first one. Raises `HistoError` for an unknown name."""
        if name not in self.sidecars:
            raise HistoError(f"adapter {name!r} is not loaded, expected one of {', '.join(self.sidecars)}")
        if isinstance(self.model, PeftModel):
            self.model.set_adapter(name)
            self.model.requires_grad_(False)
        self.name = name

    def average(self, names: Sequence[str], name: str = "average") -> None:
        """Use the mean of loaded adapters from now on; see `hf_histo.models.adapters.average`.

        Its threshold is 0.5 and its temperature 1: those of the parts are not its own.

        Raises `HistoError` for adapters that see images differently, and as `adapters.average` does.
        """
        self.sidecar.require_images(f"adapter {self.name!r}", "use it alone, without a mean")
        for each in names:
            self.set_adapter(each)
        parts = [self.sidecars[each] for each in names]
        for key in ("preprocessing", "normalizer", "views", "adapt_batch_norm"):
            if any(getattr(part, key) != getattr(parts[0], key) for part in parts):
                raise HistoError(f"adapters {', '.join(names)} differ in {key}; a mean needs the same")
        assert isinstance(self.model, PeftModel)
        adapters.average(self.model, names, name)
        self.sidecars[name] = replace(parts[0], threshold=0.5, thresholds={}, temperature=1.0)
        self.name, self.folders[name] = name, None

    def explain(
        self,
        images: Image | Sequence[Image] | datasets.Dataset,
        classes: Sequence[int],
        *,
        center: int | str = -1,
        rows: Sequence[int] | None = None,
    ) -> list[NDArray[np.float32]]:
        """Where the model sees class `classes[i]` in image i: a map (H, W) in [0, 1] for each, on its own pixels.

        Of the plain view alone; images and center are those of a call. With `rows`, it is of these images, in their
        order, and the color of an unseen center is still measured on all. See `explanation.heat_map`.
        """
        dataset = images if isinstance(images, datasets.Dataset) else _table(images, center, self.sidecar)
        dataset = self.sidecar.with_known_centers(dataset)
        pipeline = self.sidecar.pipeline.extended(dataset)
        stored, prepared, maps = ImageTable(dataset), pipeline.read(dataset), []
        for row, chosen in zip(range(len(dataset)) if rows is None else rows, classes, strict=True):
            heat = heat_map(self.model.cpu(), pipeline.evaluate(collate([prepared[row]])), chosen)
            maps.append(pipeline.back(heat, stored[row]["image"]).numpy())
        return maps

    def draw(self, dataset: datasets.Dataset, table: Predictions, path: str | Path, n: int = 12) -> None:
        """Draw where the model sees the class that it predicts, as a PNG, for images of all degrees of certainty.

        Args:
            dataset: of the one schema.
            table: its predictions.
            path: of the PNG.
            n: how many images at most, evenly spread over the probabilities of the predicted class.
        """
        names = self.sidecar.label_names
        chosen = np.array([names.index(name) for name in table["predicted"]])
        certainty = table.class_probabilities[np.arange(len(table)), chosen]
        order = np.argsort(-certainty, kind="stable")
        rows = order[np.linspace(0, len(order) - 1, min(n, len(order))).round().astype(int)]
        stored = ImageTable(dataset)
        images = [stored[row]["image"].permute(1, 2, 0).numpy() for row in rows]
        titles = []
        for row in rows:
            label = table["label"].iloc[row]
            truth = f"\nlabel {names[label]}" if label >= 0 else ""
            titles.append(f"{short(table['id'].iloc[row])}\n{names[chosen[row]]}, P = {certainty[row]:.2f}{truth}")
        explanations(images, self.explain(dataset, chosen[rows].tolist(), rows=rows.tolist()), titles, path)

    def to(self, device: str | torch.device) -> Classifier:
        """Predict on `device` from now on; without this, on the launcher's: an accelerator, where there is one."""
        self._device = torch.device(device)
        return self

    def __call__(
        self,
        images: Images,
        *,
        center: int | str = -1,
        threshold: str | float | None = None,
        batch_size: int = 64,
    ) -> Predictions:
        """Classify images, one or many, of any sizes.

        Args:
            images: paths; PIL images; arrays or tensors, (H, W, 3), (3, H, W) or (H, W), uint8 or float in [0, 1], or
                a batch of such; a column of images of a `datasets.Dataset`; the path of an HDF5 file with one group per
                image; a table of image paths, as a `DataFrame` or the path of its file (see
                `hf_histo.data.readers.image_table`); or a table of the one schema (see `hf_histo.data.schema`).
            center: name or number of the one that all images are from, -1 where unknown; a file or table has its own.
                If the adapter normalizes color, a center that training saw has stored statistics, and another one is
                measured on `images`: give all its images at once, not one by one.
            threshold: as `Sidecar.threshold_named` takes it.
            batch_size: images at a time, at most as many as have `BATCH_PIXELS` where the model sees them.

        Returns what `predict` does; `id` is the path, the key in the file, or the place in the sequence.

        Raises `HistoError`, which names the image, for one that is invalid or unreadable; and for a table of several
        splits.
        """
        suffix = Path(images).suffix.lower() if isinstance(images, str | Path) else None
        if isinstance(images, pd.DataFrame) or suffix in (*HDF5, *SUFFIXES):
            images = _one_split(images, self.sidecar.preprocessing.reading)
        if not isinstance(images, datasets.Dataset):
            images = _table(images, center, self.sidecar)
        return self.predict(images, threshold=threshold, batch_size=batch_size)

    def probabilities(self, images: Images, *, center: int | str = -1, batch_size: int = 64) -> pd.DataFrame:
        """The calibrated probability of each class, in [0, 1], by the arguments of a call.

        Returns a row for each image, whose index is its `id`, and a column for each class; the sum of a row is 1. The
        adapter's thresholds are for the column `probability` of a call, before calibration, and not for these.
        """
        table = self(images, center=center, batch_size=batch_size)
        calibrated = table.with_temperature(self.sidecar.temperature).class_probabilities
        return pd.DataFrame(calibrated, index=pd.Index(table["id"], name="id"), columns=self.sidecar.label_names)

    def validation(self) -> Predictions:
        """The run's predictions of `val`, which the adapter folder holds. Raises `HistoError` where it does not."""
        folder = self.folders[self.name]
        file = None if folder is None else folder / PREDICTIONS / "val.parquet"
        if file is None or not file.is_file():
            where = f"adapter {self.name!r}, which was not read from a folder," if file is None else str(folder)
            raise HistoError(
                f"{where} holds no {PREDICTIONS}/val.parquet, expected the run's predictions to compare with and to "
                "calibrate prediction sets on; copy the whole folder, or for sets give --calibration"
            )
        return Predictions.read(file)

    def prediction_sets(self, coverage: float = 0.9, *, calibration: Predictions | None = None) -> PredictionSets:
        """A rule that gives each image a set of classes, in which its own is with a probability of `coverage`.

        See `hf_histo.evaluation.prediction_sets`: `classifier.prediction_sets().apply(table)` adds the columns `set`
        and `decision` to a table of predictions, and `every.reason` of the rule is why no set can be claimed, or None.

        Args:
            coverage: in (0, 1), for the images of each class.
            calibration: this adapter's predictions of labeled images of the center that the sets are for, e.g.
                `classifier("labeled.csv")`. Without it, the rule is calibrated on the predictions of `val` in the
                adapter folder, by which the checkpoint was chosen as well, and promises nothing at other centers.

        Raises `HistoError` if `coverage` is out of bounds, no image is labeled, or the folder has no predictions of
        `val`.
        """
        if calibration is None:
            calibration = self.validation()
        if calibration.label_names != self.sidecar.label_names:
            raise HistoError(
                f"the predictions to calibrate on are of {calibration.label_names}, expected the classes of the "
                f"adapter, {self.sidecar.label_names}; predict the images with it"
            )
        return prediction_sets.calibrate(calibration, coverage)

    def predict(
        self,
        dataset: datasets.Dataset,
        *,
        threshold: str | float | None = None,
        test_time_views: TestTimeViews | None = None,
        adapt_batch_norm: bool | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        mixed_precision: Literal["no", "bf16"] = "no",
        token_merging: int = 0,
        description: str = "Predicting",
        is_shared: bool = True,
    ) -> Predictions:
        """Predictions table of a schema table (see `hf_histo.evaluation.predictions`), with two more columns.

        `calibrated` is the probability after division of the logits by the stored temperature, shaped like
        `probability`; `predicted` is the class's name: with two classes by `probability` at the threshold, else of the
        largest one.

        Where the adapter normalizes color, a center that training did not see is measured on `dataset` as a whole:
        give all its images at once, not one by one; likewise where batch norm is adapted. `transductive` lists which of
        the two were measured so. `test_time_views` and `adapt_batch_norm` (take the batch-norm statistics from
        `dataset`) override those of the adapter. `mixed_precision` "bf16" is faster on processors that compute in
        bfloat16, and `token_merging` is the number of pairs of patches that each block of a vision transformer merges
        (see `hf_histo.models.speed.token_merging`). Both change some decisions: the command `predict` counts them.
        In a launch of several processes, these share the images, unless `is_shared` is False (see `forward`).

        `label` is the adapter's index of the class that `dataset` names. Raises `HistoError` for a labeled class that
        the adapter does not know.

        An adapter of bags (`--aggregation`) gives a row for each bag (see `hf_histo.data.bags`), whose `id` is the name
        of the slide, or the group; with several test-time views, of the mean of the images' features. Raises
        `HistoError` for images of no group.
        """
        chosen = self.sidecar.threshold_named(threshold)
        outputs, labels, measured = self._outputs(
            dataset,
            test_time_views=test_time_views,
            adapt_batch_norm=adapt_batch_norm,
            batch_size=batch_size,
            num_workers=num_workers,
            mixed_precision=mixed_precision,
            token_merging=token_merging,
            description=description,
            is_shared=is_shared,
        )
        if self.sidecar.head.is_of_bags:
            table, _ = self._of_bags(dataset, outputs, labels, measured)
        else:
            columns = dataset.select_columns(["id", "center", "group"])[:]
            table = self._table(dataset, columns["id"], columns["center"], columns["group"], labels, outputs, measured)
        return self._decided(table, chosen)

    def predict_bags(
        self, dataset: datasets.Dataset, *, threshold: str | float | None = None, **options: Any
    ) -> tuple[Predictions, PatchPredictions]:
        """As `predict`, whose options it takes, for an adapter of bags; also what it found in each image."""
        chosen = self.sidecar.threshold_named(threshold)
        features, labels, measured = self._outputs(dataset, **options)
        table, attention = self._of_bags(dataset, features, labels, measured)
        with torch.no_grad():
            logits = heads.bag_head(self.model)(self._on_device(features)).cpu().numpy()
        alone = self._table(dataset, range(len(logits)), [-1] * len(logits), [""] * len(logits), labels, logits, [])
        return self._decided(table, chosen), PatchPredictions(alone.class_probabilities, attention)

    def _outputs(
        self,
        dataset: datasets.Dataset,
        *,
        test_time_views: TestTimeViews | None = None,
        adapt_batch_norm: bool | None = None,
        batch_size: int = 64,
        **options: Any,  # of `forward`
    ) -> tuple[NDArray[np.float64], list[int], list[str]]:
        """Logits of a table's images, or with an adapter of bags their features; labels; and what was measured."""
        if missing := [name for name in schema.features(self.sidecar.label_names) if name not in dataset.column_names]:
            raise HistoError(
                f"the table has the columns {dataset.column_names}, but no {missing[0]}; pass a column of images, "
                'such as table["image"], or a table of hf_histo.data.load'
            )
        if not len(dataset):
            raise HistoError("no image was given; pass at least one")
        _check_reading(schema.recorded(dataset), self.sidecar.preprocessing.reading)
        known = self.sidecar.with_known_centers(dataset)
        labels, pipeline = self.sidecar.labels_of(dataset), self.sidecar.pipeline.extended(known)
        if test_time_views is not None:
            pipeline = replace(pipeline, test_time_views=test_time_views)
        adapts = self.sidecar.adapt_batch_norm if adapt_batch_norm is None else adapt_batch_norm
        outputs = forward(
            heads.Features(self.model) if self.sidecar.head.is_of_bags else self.model,
            known,
            pipeline,
            adapt_batch_norm=adapts,
            batch_size=max(1, min(batch_size, BATCH_PIXELS // pipeline.preprocessing.image_size**2)),
            device=self._device,
            **options,
        )
        measures_color = pipeline.normalizer is not self.sidecar.normalizer
        return outputs, labels, predictions.measured(colors=measures_color, batch_norm=adapts)

    def _of_bags(
        self, dataset: datasets.Dataset, features: NDArray[np.float64], labels: list[int], measured: list[str]
    ) -> tuple[Predictions, NDArray[np.float64] | None]:
        """Predictions of the bags of a table by the features (n, d) of its images, and the attention (n,), or None."""
        found, given, head = bags.find(dataset, labels), self._on_device(features), heads.bag_head(self.model)
        logits, attention = [], np.full(len(features), np.nan)
        with torch.no_grad():
            for rows in found.rows:
                of_bag, weights = head.of_bag(given[rows])
                logits.append(of_bag.cpu().numpy())
                if weights is not None:
                    attention[rows] = weights.cpu().numpy()
        table = self._table(dataset, found.names, found.centers, found.groups, found.labels, np.stack(logits), measured)
        return table, None if np.isnan(attention).any() else attention

    def _on_device(self, features: NDArray[np.float64]) -> torch.Tensor:
        """Features as float32, where the model is after `forward`."""
        return torch.from_numpy(features).to(next(self.model.parameters()).device, torch.float32)

    def _table(
        self,
        dataset: datasets.Dataset,
        ids: Iterable[Any],
        centers: ArrayLike,
        groups: Iterable[str],
        labels: ArrayLike,
        logits: NDArray[Any],
        measured: list[str],
    ) -> Predictions:
        return Predictions.make(
            ids,
            centers,
            groups,
            labels,
            logits,
            label_names=self.sidecar.label_names,
            center_names=schema.center_names(dataset),
            transductive=measured,
        )

    def _decided(self, table: Predictions, threshold: float) -> Predictions:
        """The table with the columns `calibrated` and `predicted`."""
        names = np.array(self.sidecar.label_names)
        return table.assign(
            calibrated=table.with_temperature(self.sidecar.temperature)["probability"],
            predicted=names[table.predicted_classes(threshold)],
        )


class Ensemble(Classifier):
    """Several classifiers whose mean logit is the prediction, with a threshold and a temperature of their own.

    `sidecar` is that of the first member with these; each member sees images by its own.
    """

    def __init__(self, members: Sequence[Classifier], sidecar: Sidecar, folder: Path | None = None) -> None:
        super().__init__(members[0].model, sidecar, folder)
        self.members = list(members)

    def __repr__(self) -> str:
        return printable(f"Ensemble({', '.join(map(repr, self.members))})")

    @classmethod
    def from_folder(cls, folder: Path, *, backbone: str | None = None) -> Ensemble:
        """From a local folder; see `hf_histo.adapter.ensemble`. `backbone` is for members that share one.

        Raises `HistoError` as `ensemble.read` and `hub.load` do.
        """
        made = ensemble.read(folder)
        members = [Classifier.from_pretrained(folder / name, backbone=backbone) for name in made.members]
        return cls(members, made.sidecar(members[0].sidecar), folder)

    def to(self, device: str | torch.device) -> Ensemble:
        """Predict on `device` from now on."""
        for member in self.members:
            member.to(device)
        return self

    def load_adapter(
        self, source: str | Path, name: str, *, revision: str | None = None, backbone: str | None = None
    ) -> None:
        """Raises `HistoError`: an ensemble has several backbones."""
        raise HistoError(f"{source}: can't join an ensemble; make one with it: hf_histo ensemble")

    def explain(
        self,
        images: Image | Sequence[Image] | datasets.Dataset,
        classes: Sequence[int],
        *,
        center: int | str = -1,
        rows: Sequence[int] | None = None,
    ) -> list[NDArray[np.float32]]:
        """The mean of the members' maps; see `Classifier.explain`."""
        of_members = [member.explain(images, classes, center=center, rows=rows) for member in self.members]
        return [np.mean(maps, axis=0, dtype=np.float32) for maps in zip(*of_members, strict=True)]

    def predict(
        self,
        dataset: datasets.Dataset,
        *,
        threshold: str | float | None = None,
        test_time_views: TestTimeViews | None = None,
        adapt_batch_norm: bool | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        mixed_precision: Literal["no", "bf16"] = "no",
        token_merging: int = 0,
        description: str = "Predicting",
        is_shared: bool = True,
    ) -> Predictions:
        """As `Classifier.predict`, by the mean of the members' logits; other arguments go to each of them.

        `transductive` lists what any member measured on `dataset`.
        """
        chosen = self.sidecar.threshold_named(threshold)
        tables = [
            member.predict(
                dataset,
                test_time_views=test_time_views,
                adapt_batch_norm=adapt_batch_norm,
                batch_size=batch_size,
                num_workers=num_workers,
                mixed_precision=mixed_precision,
                token_merging=token_merging,
                description=f"{description} ({place} of {len(self.members)})",
                is_shared=is_shared,
            )
            for place, member in enumerate(self.members, start=1)
        ]
        return self._decided(ensembling.average(tables), chosen)


def _one_split(source: Any, reading: Reading) -> datasets.Dataset:
    """The images of a file or table that has one split, read as those of training."""
    splits = load_data(source, reading=reading)
    if len(splits) > 1:
        found = f"the table has the splits {', '.join(splits)}"
        raise HistoError(f'{found}, expected one; pass one of them, such as load_dataset(...)["test"]')
    return next(iter(splits.values()))


def _table(images: Image | Sequence[Image], center: int | str, sidecar: Sidecar) -> datasets.Dataset:
    """The caller's images as a table of the one schema, each checked and read as those of training."""
    if isinstance(images, torch.Tensor | np.ndarray):
        several = list(images) if images.ndim == 4 else [images]
    else:
        several = [images] if isinstance(images, str | Path | PIL.Image.Image) else _listed(images)
    count, reading = len(several), sidecar.preprocessing.reading
    name, center = ([center], 0) if isinstance(center, str) else ([], center)
    if not -(2**63) <= center < 2**63:
        raise HistoError(f"center is {center}, expected the number of a center, or -1 where it is unknown")
    rows = {
        "id": [str(image) if isinstance(image, str | Path) else str(i) for i, image in enumerate(several)],
        "image": [{"bytes": _encoded(image, i, reading), "path": None} for i, image in enumerate(several)],
        "label": [-1] * count,
        "center": [center] * count,
        "group": [""] * count,
    }
    return datasets.Dataset.from_dict(rows, features=schema.features(sidecar.label_names, name))


def _check_reading(found: Reading, expected: Reading) -> None:
    """Raise HistoError for images that were read otherwise than those of training."""
    if found.gray_bits not in (None, expected.gray_bits):
        raise HistoError(
            f"16-bit gray images were read as of {found.gray_bits} bits, expected {expected.gray_bits or 8} as in "
            "training; "
            + (f"give --gray_bits {expected.gray_bits}" if expected.gray_bits else "convert them to 8 bits")
        )
    if difference := expected.difference(found):
        used, wanted = (each.text(difference) for each in (found, expected))
        raise HistoError(f"images were read with {used}, expected {wanted} as in training; load them so")


def _listed(images: Sequence[Image]) -> list[Image]:
    try:
        return list(images)
    except TypeError:
        raise HistoError(f"images is a {type(images).__name__}; expected one or several images") from None


def _encoded(image: Image, place: int, reading: Reading) -> bytes:
    """The bytes of an image file, which `schema.decode` takes without options; see `schema.checked`.

    Raises HistoError, naming the image, for one that can't be read.
    """
    if isinstance(image, str | Path):
        try:
            return schema.checked(regular(image).read_bytes(), str(image), reading)
        except OSError as error:
            raise HistoError(f"{image}: can't be read ({error.strerror}); expected an image file") from None
    if isinstance(image, PIL.Image.Image):
        return schema.encode_ppm(schema.rgb(image, f"image {place}", reading))
    if isinstance(image, torch.Tensor):
        image = (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise HistoError(
            f"image {place} is of type {type(image).__name__}; expected a path, PIL image, array or tensor"
        )
    return schema.encode_ppm(_pixels(image, place))


def _pixels(image: np.ndarray, place: int) -> np.ndarray:
    """uint8 (H, W, 3) of an array that holds an image in any usual way."""
    first, last = (image.ndim == 3 and image.shape[side] == 3 for side in (0, -1))
    if (image.ndim != 2 and first == last) or 0 in image.shape:
        found = "which can be read in two ways" if first and last else "which is no image"
        raise HistoError(f"image {place} has shape {image.shape}, {found}; expected (H, W, 3), (3, H, W) or (H, W)")
    if image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise HistoError(
                f"image {place} has {image.dtype} values from {low:g} to {high:g}; expected [0, 1], or uint8: undo any "
                "normalization"
            )
        image = np.rint(image.astype(np.float32) * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise HistoError(f"image {place} is {image.dtype}; expected uint8 in [0, 255], or float in [0, 1]")
    if image.ndim == 2:
        return np.stack([image] * 3, axis=-1)
    return image.transpose(1, 2, 0) if first else image
