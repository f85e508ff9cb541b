"""The command that predicts whole slides: tiles, objects for QuPath, a heat map and scores of each.

Each process takes whole slides: it holds a lock on a file beside a slide's folder while it predicts it, as `grid` does
for runs. A folder appears when all that is in it is written. So the same command continues after it was killed, and
several processes, of one launch or of several commands, share the slides.
"""

from __future__ import annotations

import glob
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hf_histo import launch
from hf_histo.config import DataOptions
from hf_histo.config.commands import PredictSlidesOptions
from hf_histo.data import cache, schema
from hf_histo.data.readers import image_rows, slides
from hf_histo.data.readers.slides import Grid
from hf_histo.data.reading import Reading
from hf_histo.errors import HistoError
from hf_histo.evaluation import slide_maps
from hf_histo.evaluation.figures.slide_heat_map import slide_heat_map
from hf_histo.evaluation.predictions import Predictions, decided, harmless
from hf_histo.experiments.grid import each_once, failure
from hf_histo.files import atomic_file, atomic_folder, checksums, locked, read_json, require_output, write_json
from hf_histo.inference import Classifier, Ensemble

logger = logging.getLogger(__name__)

CHUNK = 2**16  # tiles that are predicted at a time, so that memory does not grow with a slide
OVERVIEW = 1400  # pixels on the longer side of a heat map
RECORD = "record.json"  # in a slide's folder
SHOWN = 3  # failed slides that the last line names
# Options that decide what a slide's folder holds.
DECIDING = ("min_tissue", "assume_mpp", "top_k", "geojson", "mixed_precision")


@dataclass(frozen=True)
class Listed:
    """A slide to predict: its name, also that of its folder, its path, and the name of its center, "" if unknown."""

    name: str
    path: Path
    center: str = ""


@dataclass(frozen=True)
class Found:
    """What a model predicts of a slide.

    Attributes:
        probabilities: float64 (n, K), of the tiles; with an adapter of bags, of each as if it were a slide alone.
        transductive: what was measured on the tiles as a whole.
        slide: with an adapter of bags, its prediction of the slide, in one row; else None.
        attention: float64 (n,), the weight of each tile in that prediction, with a sum of 1; None without attention.
    """

    probabilities: NDArray[np.float64]
    transductive: list[str]
    slide: Predictions | None = None
    attention: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Job:
    """How all slides are predicted; `made_by` is what their records hold of it."""

    options: PredictSlidesOptions
    classifier: Classifier
    mpp: float
    patch_size: int
    stride: int
    threshold: float
    made_by: dict[str, Any]

    def folder(self, listed: Listed) -> Path:
        """Of a slide's results."""
        return self.options.output_dir / listed.name

    def beside(self, listed: Listed, suffix: str) -> Path:
        """A file beside that folder: the lock, or the error."""
        return self.options.output_dir / f".{listed.name}.{suffix}"


def predict_slides(options: PredictSlidesOptions) -> str:
    """Predict slides, and write a folder for each, and `slides.csv` with a row for each.

    Slides that this adapter and these options have predicted are not predicted again; those that an earlier command
    predicted likewise into the same folder keep their rows. Returns a summary as text. Raises
    HistoError for options that don't fit the adapter, for results of another adapter or other options, unless they
    are to be overwritten, and in the end for slides that failed, when all others are predicted.
    """
    require_output(options.output_dir, [*options.slides, options.adapter, options.backbone], folder=True)
    listed = _listed(options)
    process = launch.process()  # all at once: they wait for each other, the first time
    job = _job(options)
    _refuse_others(job, listed)
    found = _settled(job, listed)
    table = options.output_dir / "slides.csv"
    failed = {each.name: result for each, result in zip(listed, found, strict=True) if isinstance(result, str)}
    if process.is_main_process:
        rows = [
            {"slide": harmless(each.name)} | ({"error": harmless(result)} if isinstance(result, str) else result)
            for each, result in zip(listed, found, strict=True)
        ]
        rows += _earlier(job, listed)
        columns = sorted({name: None for row in rows for name in row}, key=lambda name: name == "error")
        with atomic_file(table) as temporary:
            pd.DataFrame(rows, columns=columns).to_csv(temporary, index=False)
    process.wait_for_everyone()  # a launcher ends all processes when the first one fails
    if failed:
        first = "; ".join(list(failed.values())[:SHOWN])
        raise HistoError(
            f"{len(failed)} of {len(listed)} slides failed: {first}{'; ...' if len(failed) > SHOWN else ''}; the "
            f"others are in {table}, and the same command tries these again"
        )
    tiles = sum(result["tiles"] for result in found if not isinstance(result, str))
    return f"{len(listed)} slides, {tiles} tiles: {table}"


def _listed(options: PredictSlidesOptions) -> list[Listed]:
    """The slides that the command line names, those of tables included. Raises HistoError for names that are equal."""
    found: list[Listed] = []
    for text in options.slides:
        path = Path(text)
        if path.suffix.lower() not in image_rows.SUFFIXES:
            found.append(Listed(slides.name_of(path.absolute().name), path))
            continue
        table = DataOptions(
            data=text,
            image_root=options.image_root,
            slide_column=options.slide_column,
            center_column=options.center_column,
        )
        if not path.is_file():
            raise HistoError(f"{path}: no such file, expected a table of slides; correct the path")
        rows = image_rows.read(path, table, image_rows.NAMED_OF_SLIDES)
        for name, file, center in zip(rows["name"], rows["path"], rows["center"], strict=True):
            found.append(Listed(name.replace("/", "_"), file, center))
    by_name: dict[str, Listed] = {}
    for each in found:
        if (other := by_name.setdefault(each.name.casefold(), each)) is not each:
            raise HistoError(
                f"{each.path} and {other.path}: two slides of the name {each.name!r}, which is that of the folder of "
                "results, expected one; rename one, or predict them into two folders"
            )
    return found


def _job(options: PredictSlidesOptions) -> Job:
    """Load the adapter. Raises HistoError for options that don't fit it."""
    classifier = Classifier.from_pretrained(options.adapter, revision=options.revision, backbone=options.backbone)
    reading = classifier.sidecar.preprocessing.reading
    mpp, patch_size = (_as_trained(options, reading, name) for name in ("mpp", "patch_size"))
    stride = options.stride or patch_size
    if patch_size % stride:
        raise HistoError(
            f"--stride is {stride}, expected a divisor of the patch size {patch_size}, so that overlapping tiles cover "
            f"the same places; give {patch_size // 2}, for example"
        )
    threshold = classifier.sidecar.threshold_named(options.threshold)
    made_by = {
        "version": slides.VERSION,
        "adapter": _fingerprint(classifier),
        **{"mpp": mpp, "patch_size": patch_size, "stride": stride, "threshold": threshold},
        **{name: getattr(options, name) for name in DECIDING},
    }
    return Job(options, classifier, mpp, int(patch_size), int(stride), threshold, made_by)


def _as_trained(options: PredictSlidesOptions, reading: Reading, name: str) -> Any:
    """Resolution or size of the patches: as the adapter states it, else as the option does."""
    given, trained = getattr(options, name), getattr(reading, name)
    if given is not None and trained not in (None, given):
        raise HistoError(f"--{name} is {given}, expected {trained} as in training; leave it out")
    if (value := trained if given is None else given) is None:
        raise HistoError(
            f"--adapter {options.adapter}: states no {name}, since it was not trained on slides; give that of its "
            f"training images by --{name}"
        )
    return value


def _fingerprint(classifier: Classifier) -> str:
    """Hash of what decides an adapter's predictions: its weights and settings."""
    folder = classifier.folders[classifier.name]
    assert folder is not None
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".json") and path.is_file()]
    found = checksums({path.relative_to(folder).as_posix(): path for path in files})
    return checksums({"all": repr(found).encode()})["all"]


def _refuse_others(job: Job, listed: Sequence[Listed]) -> None:
    """Raise HistoError for folders that are no results, or those of another adapter, other options or another slide."""
    for folder, each in ((job.folder(each), each) for each in listed):
        if not folder.exists():
            continue
        if not (record := _record(folder)):
            raise HistoError(f"{folder}: exists without a {RECORD}, expected results; choose another --output_dir")
        try:
            ours = _decisive(job, each)
        except (HistoError, OSError):
            continue  # reported when its turn comes
        difference = next((name for name, value in ours.items() if record.get(name) != value), None)
        if difference and not job.options.overwrite:
            raise HistoError(
                f"{folder}: predicted with another {difference}, expected results of this command; choose another "
                "--output_dir, or give --overwrite"
            )


def _decisive(job: Job, each: Listed) -> dict[str, Any]:
    """What decides a slide's results: how all are predicted, its center, and the places, sizes and times of its files.

    Raises HistoError and OSError as `cache.state_of` does.
    """
    folder = each.path.parent
    files = {path.relative_to(folder).as_posix(): path for path in slides.files_of(each.path)}
    return {**job.made_by, "slide": cache.state_of(folder, files), "center": each.center}


def _record(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(folder / RECORD)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _scores(job: Job, each: Listed) -> dict[str, Any] | None:
    """The scores of a slide that is predicted already; None if it is not, or was otherwise."""
    record = _record(job.folder(each))
    found = record.pop("scores", None)
    return found if isinstance(found, dict) and record == _decisive(job, each) else None


def _earlier(job: Job, listed: Sequence[Listed]) -> list[dict[str, Any]]:
    """Rows of the other slides in the output folder that were predicted with this adapter and these options."""
    names = {each.name for each in listed}
    folders = [path for path in sorted(job.options.output_dir.iterdir()) if path.is_dir() and path.name not in names]
    records = {folder.name: _record(folder) for folder in folders}
    return [
        {"slide": harmless(name), **record["scores"]}
        for name, record in records.items()
        if isinstance(record.get("scores"), dict) and job.made_by.items() <= record.items()
    ]


def _settled(job: Job, listed: Sequence[Listed]) -> list[dict[str, Any] | str]:
    """The scores of each slide, or why it failed; slides that other processes predict are waited for."""
    started = time.time()
    return each_once(listed, lambda each: locked(job.beside(each, "lock")), lambda each: _settle(job, each, started))


def _settle(job: Job, each: Listed, started: float) -> dict[str, Any] | str:
    """The scores of a slide, which is predicted if no process has done so, or why it failed."""
    error_file = job.beside(each, "error")
    if known := failure(error_file, started):  # another process of this launch tried it
        return known
    try:
        found = _scores(job, each) or _predict(job, each)
    except (HistoError, OSError) as error:
        # Of a data loader's worker, the message holds the traceback, and the error itself last.
        text = str(error).rsplit("HistoError: ", 1)[-1].strip()
        logger.warning("%s", text)
        error_file.write_text(text, encoding="utf-8")
        return text
    error_file.unlink(missing_ok=True)
    return found


def _predict(job: Job, each: Listed) -> dict[str, Any]:
    """Predict a slide and write its folder; returns its scores."""
    start, options, names = time.monotonic(), job.options, job.classifier.sidecar.label_names
    slide = slides.open_slide(each.path)
    decisive = _decisive(job, each)
    grid = slides.grid(
        slide,
        mpp=job.mpp,
        patch_size=job.patch_size,
        stride=job.stride,
        min_tissue=options.min_tissue,
        assume_mpp=options.assume_mpp,
    )
    slides.require_patches(grid, each.path, "tile")
    model = _found(job, each, grid)
    probabilities, attention = model.probabilities, model.attention
    classes = decided(probabilities, job.threshold)
    found = slide_maps.slide_map(grid, probabilities, job.threshold)
    scale = max(1.0, max(slide.width, slide.height) / OVERVIEW)
    overview, _ = slides.overview(slide, scale)
    folder = job.folder(each)
    # Left by a process that was killed; this one holds the slide's lock.
    for left in folder.parent.glob(f".{glob.escape(each.name)}.{8 * '?'}.incomplete"):
        shutil.rmtree(left)
    with atomic_folder(folder) as temporary:
        _write_tiles(temporary / "tiles.csv", each, grid, model, [names[place] for place in classes], names)
        features = (
            slide_maps.tiles(grid, probabilities, classes, names, attention)
            if options.geojson == "tiles"
            else slide_maps.regions(found, names)
        )
        slide_maps.write_geojson(temporary / f"{options.geojson}.geojson", features)
        slide_heat_map(found, overview, scale, names, temporary / "heat_map.png", title=each.name)
        if attention is not None:
            heat = attention / attention.max()
            weights = slide_maps.slide_map(grid, np.stack([1 - heat, heat], axis=1), threshold=0.5)
            drawn = temporary / "attention.png"
            slide_heat_map(weights, overview, scale, names[:2], drawn, title=each.name, shown="attention / its maximum")
        scores: dict[str, Any] = dict(slide_maps.scores(found, probabilities, names, options.top_k))
        if model.slide is not None:
            (of_classes,) = model.slide.class_probabilities.tolist()
            scores |= {f"probability_{name}": value for name, value in zip(names, of_classes, strict=True)}
            scores["predicted"] = harmless(model.slide["predicted"].iloc[0])
        scores["seconds"] = round(time.monotonic() - start, 2)
        if model.transductive:
            scores["transductive"] = ", ".join(model.transductive)
        write_json(temporary / RECORD, {**decisive, "scores": scores})
        if folder.exists():  # of another adapter, see `_refuse_others`
            shutil.rmtree(folder)
    return scores


def _found(job: Job, each: Listed, grid: Grid) -> Found:
    """Predict the tiles, and with an adapter of bags the slide."""
    members = job.classifier.members if isinstance(job.classifier, Ensemble) else [job.classifier]
    # What is measured on a slide's tiles is measured on all of them.
    measures = any(member.sidecar.normalizer or member.sidecar.adapt_batch_norm for member in members)
    chunk, sidecar = len(grid.corners) if measures else CHUNK, job.classifier.sidecar
    names, centers = sidecar.label_names, sidecar.center_names
    how: dict[str, Any] = {
        "threshold": job.options.threshold,
        "batch_size": job.options.batch_size,
        "num_workers": launch.reading_processes() if job.options.num_workers is None else job.options.num_workers,
        "mixed_precision": job.options.mixed_precision,
        "description": each.name,
        "is_shared": False,
    }
    if sidecar.head.is_of_bags:
        slide, tiles = job.classifier.predict_bags(table_of(each, grid, grid.corners, names, centers), **how)
        return Found(tiles.probabilities, list(slide.transductive or ()), slide, tiles.attention)
    parts, transductive = [], dict[str, None]()
    for first in range(0, len(grid.corners), chunk):
        corners = grid.corners[first : first + chunk]
        table = job.classifier.predict(table_of(each, grid, corners, names, centers), **how)
        parts.append(table.class_probabilities)
        transductive |= dict.fromkeys(table.transductive or ())
    return Found(np.concatenate(parts), list(transductive))


def table_of(
    each: Listed,
    grid: Grid,
    corners: NDArray[np.int64],
    label_names: Sequence[str],
    center_names: Sequence[str] = (),
) -> datasets.Dataset:
    """Tiles as a table of the one schema, whose images are read from the slide when they are needed.

    `center_names` are those of the training centers, none where they had numbers: the slide's center is given likewise.
    """
    count, path = len(corners), each.path.absolute()
    (center,), names = image_rows.numbered(pd.Series([each.center]))
    if each.center and center_names:
        center, names = 0, [each.center]
    places = corners.tolist()
    rows = {
        "id": [f"{each.name}_{x}_{y}" for x, y in places],
        "image": [{"bytes": None, "path": slides.reference(path, x, y, grid.size, grid.pixels)} for x, y in places],
        "label": [-1] * count,
        "center": [int(center)] * count,
        "group": [each.name] * count,
    }
    return datasets.Dataset.from_dict(rows, features=schema.features(label_names, names))


def _write_tiles(
    path: Path,
    each: Listed,
    grid: Grid,
    found: Found,
    classes: Sequence[str],
    label_names: Sequence[str],
) -> None:
    """Write `tiles.csv`: slide, x, y, size in pixels of level 0, class, probability of each class, and attention."""
    columns = {"slide": harmless(each.name), "x": grid.corners[:, 0], "y": grid.corners[:, 1], "size": grid.size}
    columns |= {"predicted": [harmless(name) for name in classes]}
    columns |= {f"probability_{name}": found.probabilities[:, place] for place, name in enumerate(label_names)}
    if found.attention is not None:
        columns["attention"] = found.attention
    pd.DataFrame(columns).to_csv(path, index=False)
