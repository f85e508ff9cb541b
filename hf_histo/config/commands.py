"""The options of the commands that are no training run; one dataclass each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_histo.config.experiments import Sharing
from hf_histo.config.options import SET, DataOptions, TableOptions, option, required, same

Criterion = Literal["balanced_accuracy", "f1", "accuracy", "sensitivity"]  # of a threshold
CACHE = "folder of the converted data (default: the datasets library's cache)"


@dataclass(kw_only=True)
class AdapterSource:
    """An adapter, and the model that it was trained on."""

    adapter: str = required("folder of an adapter or an ensemble, or its name on the Hub", is_path=True)
    revision: str | None = option(None, "branch, tag or commit of an adapter on the Hub")
    backbone: str | None = option(
        None, "the base model, where it is no longer where the adapter was trained", is_path=True
    )


@dataclass(kw_only=True)
class PredictOptions(TableOptions, AdapterSource):
    data: str = required("folder, table of images, or HDF5 file", is_path=True)
    split: str = option("test", "part of a folder to predict")
    output: Path = required("CSV file to write")
    details: bool = option(False, "also the class's name and the calibrated probability")
    threshold: str | None = option(None, "a probability, or a name that the adapter holds, e.g. validation")
    balanced: float | None = option(
        None, "call this share of the images 1 (0.5 if none is given)", bare=0.5, needs={"threshold": None}
    )
    coverage: float | None = option(
        None,
        "also a set of classes for each image, in which its own is with this probability (0.9 if none is given), and "
        "'refer to a pathologist' where the set is not one class",
        bare=0.9,
        above=0,
        below=1,
    )
    calibration: str | None = option(
        None,
        "labeled images of the center that is predicted, other ones than --data: a table or folder, 10 to 100 or more, "
        "to calibrate the sets on (default: the adapter's val)",
        needs={"coverage": SET},
        is_path=True,
    )
    test_time_views: int | None = option(None, "mean logit of 1 or 8 views of the square, or any drawn ones")
    test_time_augmentation: str | None = option(None, "square, or a preset of --augmentation to draw views from")
    adapt_batch_norm: bool | None = option(None, "take batch-norm statistics from these images", bare=True)
    explain: Path | None = option(None, "PNG file: draw where the model sees the predicted class")
    batch_size: int = option(64, "images at a time", at_least=1)
    num_workers: int = option(0, "processes that read images while the model runs", at_least=0)
    mixed_precision: Literal["no", "bf16"] = option(
        "no", "compute in bfloat16; how many decisions that changes is measured on some of the images, and printed"
    )
    token_merging: int = option(
        0, "pairs of patches that each block of a vision transformer merges; measured likewise", at_least=0
    )
    cache_dir: str | None = option(None, CACHE, is_path=True)


@dataclass(kw_only=True)
class PredictSlidesOptions(AdapterSource):
    slides: list[str] = required("slides, or tables of them with a column slide; may stand first", is_path=True)
    output_dir: Path = required("folder for slides.csv, and a folder for each slide")
    slide_column: str | None = same(DataOptions, "slide_column")
    center_column: str | None = same(DataOptions, "center_column")
    image_root: str | None = same(DataOptions, "image_root")
    mpp: float | None = same(
        DataOptions, "mpp", "micrometers per pixel of the training images, where the adapter does not state them"
    )
    patch_size: int | None = same(
        DataOptions, "patch_size", "their side in pixels, where the adapter does not state it"
    )
    stride: int | None = same(
        DataOptions,
        "stride",
        "pixels from one tile to the next, a divisor of the patch size: where tiles overlap, heat map, regions and "
        "areas have their mean (default: the patch size)",
    )
    min_tissue: float = same(DataOptions, "min_tissue")
    assume_mpp: float | None = same(DataOptions, "assume_mpp")
    threshold: str | None = option(None, "a probability, or a name that the adapter holds, e.g. validation")
    top_k: int = option(10, "tiles with the largest probabilities, whose mean is a score of the slide", at_least=1)
    geojson: Literal["tiles", "regions"] = option("tiles", "objects for QuPath: each tile, or merged regions by class")
    batch_size: int = option(64, "tiles at a time", at_least=1)
    num_workers: int | None = option(
        None,
        "processes that read slides while the model runs (default: 1, on an accelerator one for each other core, up to "
        "8)",
        at_least=0,
    )
    mixed_precision: Literal["no", "bf16"] = option("no", "compute in bfloat16, which changes some decisions")
    overwrite: bool = option(False, "replace slides that another adapter or other options predicted")


@dataclass(kw_only=True)
class AcceptOptions(TableOptions, AdapterSource):
    data: str = required("images of the new site, 10 to 500: folder, table or HDF5 file", is_path=True)
    output_dir: Path = required("folder for acceptance.html and acceptance.json")
    split: str = option("test", "part of a folder that has several")
    labels: str | None = option(None, "a few labeled images of the site: a table or folder", is_path=True)
    reference: str | None = option(
        None,
        "images like those of val (of a folder, its val): compare the features of both, instead of log odds with those "
        "that the adapter holds",
        is_path=True,
    )
    tolerance: float = option(0.05, "by how much the accuracy may be lower than on val", at_least=0, below=1)
    overwrite: bool = option(False, "replace an earlier acceptance.json and its page")
    batch_size: int = option(64, "images at a time", at_least=1)
    cache_dir: str | None = option(None, CACHE, is_path=True)


@dataclass(kw_only=True)
class AcceptanceStudyOptions:
    runs: Path = required("folder of a finished leave-one-center-out", is_path=True)
    output_dir: Path = required("folder for acceptance_study.md and acceptance_study.json")
    data: str | None = option(
        None, "the data of the runs, to test colors as well (default: predictions alone)", is_path=True
    )
    counts: list[int] = option([20, 50, 100], "numbers of images of a site", at_least=1)
    draws: int = option(100, "of the images, for each number", at_least=1)
    tolerance: float = option(0.05, "by how much the accuracy may be lower than on val", at_least=0, below=1)
    seed: int = option(0, "of the draws", at_least=0)


@dataclass(kw_only=True)
class CoverageOptions:
    runs: Path = required("folder of a finished leave-one-center-out", is_path=True)
    output_dir: Path = required("folder for coverage.md and coverage.json")
    coverage: float = option(0.9, "of the prediction sets, for the images of each class", above=0, below=1)
    labeled: int = option(50, "images of the held-out center to calibrate on", at_least=1)
    draws: int = option(200, "of these images, over which results are averaged", at_least=1)
    seed: int = option(0, "of the draws", at_least=0)


@dataclass(kw_only=True)
class CompareAdaptersOptions(TableOptions):
    adapters: list[str] = required("adapter folders, or names on the Hub", is_path=True)
    backbone: str | None = option(
        None, "the base model, where it is no longer where the adapters were trained", is_path=True
    )
    data: str = required("folder, table of images, or HDF5 file, with labels", is_path=True)
    split: str = option("val", "part of the folder to predict")
    average: bool = option(False, "also the mean of the adapters")
    batch_size: int = option(64, "images at a time", at_least=1)
    cache_dir: str | None = option(None, CACHE, is_path=True)


@dataclass(kw_only=True)
class EnsembleOptions:
    adapters: list[str] = required("adapter folders of runs on one data set, or names on the Hub", is_path=True)
    output_dir: Path = required("folder to write, which must not exist")


@dataclass(kw_only=True)
class SoupOptions(TableOptions):
    adapters: list[str] = required("adapter folders of LoRA runs on one backbone and data set", is_path=True)
    backbone: str | None = option(
        None, "the base model, where it is no longer where the adapters were trained", is_path=True
    )
    data: str = required("the data of the runs", is_path=True)
    output_dir: Path = required("folder to write, which must not exist")
    batch_size: int = option(64, "images at a time", at_least=1)
    cache_dir: str | None = option(None, CACHE, is_path=True)


@dataclass(kw_only=True)
class EvaluateOptions:
    predictions: list[str] = required("predictions files, one for each split", is_path=True)
    output_dir: Path = required("folder for metrics.json and the figures")
    ensemble: bool = option(False, "average the files, of one split by several models")
    calibrate_on: list[str] | None = option(None, "labeled files to fit a temperature on", is_path=True)
    threshold: float | None = option(None, "probability from which on class 1 is predicted (default: 0.5)")
    threshold_on: list[str] | None = option(
        None, "labeled files to choose a threshold on", needs={"threshold": None}, is_path=True
    )
    balanced: float | None = option(
        None,
        "predict class 1 for this share of the images (0.5 if none is given); transductive",
        bare=0.5,
        needs={"threshold": None, "threshold_on": None},
    )
    criterion: Criterion = option("balanced_accuracy", "what --threshold_on maximizes", needs={"threshold_on": SET})
    specificity: float = option(0.95, "the least, for --criterion sensitivity", needs={"criterion": "sensitivity"})
    negative_class: str | None = option(None, "class that means 'nothing found', for sensitivity at a specificity")
    submission: Path | None = option(None, "CSV file: write ID, Pred, Prob of the one split")
    overwrite: bool = option(False, "replace an earlier metrics.json and its figures")


@dataclass(kw_only=True)
class AuditOptions(TableOptions):
    data: str = required("folder, table of images, HDF5 file, or 'synthetic'", is_path=True)
    output_dir: Path = required("folder for audit.json and the figures")
    similarity: float | None = option(
        None, "correlation of details, up to 1, from which on images are copies (default: as in --split clean)"
    )
    near: bool = option(
        False, "also count families of near images, such as neighboring slices (every pair is compared)"
    )
    strict: bool = option(False, "exit with code 1 where there are findings")
    overwrite: bool = option(False, "replace an earlier audit.json and its figures")
    adapter: str | None = option(
        None, "adapter folder or Hub name, for a map before and after adaptation", is_path=True
    )
    backbone: str | None = option(
        None,
        "model whose frozen features measure how unlike the splits are; with --adapter, its base model",
        is_path=True,
    )
    on_bad_image: Literal["error", "skip"] = option("error", "stop at an image that can't be read, or leave it out")
    cache_dir: str | None = option(None, CACHE, is_path=True)


@dataclass(kw_only=True)
class AppOptions(AdapterSource):
    port: int | None = option(None, "of the page (default: the first free one from 7860 on)", needs={"space_dir": None})
    space_dir: Path | None = option(None, "write a Space of the Hub into this folder, which must not exist")


@dataclass(kw_only=True)
class ExportOptions(AdapterSource):
    format: Literal["merged", "onnx", "wsinfer"] = required("what to write")
    output_dir: Path = required("folder to write, which must not exist")


@dataclass(kw_only=True)
class PushOptions:
    adapter: str = required("adapter folder of a finished run", is_path=True)
    hub_model_id: str = required("repository on the Hub: owner/name")
    hub_base_model: str | None = option(None, "name on the Hub (owner/name) of a backbone that was a local folder")
    hub_private: bool = option(False, "create the repository as private", needs={"hub_create_pr": False})
    hub_revision: str | None = option(None, "branch of it to write to, made where it is missing (default: main)")
    hub_create_pr: bool = option(False, "open a pull request there instead of writing", needs={"hub_revision": None})


@dataclass(kw_only=True)
class ImportBackboneOptions:
    backbone: str | None = option(None, "short name")
    output_dir: Path | None = option(None, "new folder for the backbone")
    revision: str | None = option(None, "branch, tag or commit on the Hub", needs={"snapshot": None})
    snapshot: Path | None = option(None, "its files, where they were downloaded before")
    list: bool = option(False, "show the registered models", needs={"backbone": None, "output_dir": None})


@dataclass(kw_only=True)
class DoctorOptions:
    cache_dir: str | None = option(None, CACHE, is_path=True)


@dataclass(kw_only=True)
class MakeSlidesOptions:
    output_dir: Path = required("new folder for the slides")
    kind: Literal["tiff", "jpeg", "ome-tiff", "dicom"] = option(
        "tiff", "lossless or JPEG-compressed pyramidal TIFF, OME-TIFF, or a folder of DICOM files for each slide"
    )
    slides_per_center: int = option(4, "slides of each of five centers", at_least=1)
    cells: int = option(10, "of 96 pixels (48 micrometers) along the side of a slide", at_least=1, at_most=200)
    tumor_patches: int | None = option(
        None,
        "cells of tumor on a slide with tumor, side by side (default: a region of a third of the tissue)",
        at_least=1,
    )
    seed: int = option(0, "of all that is drawn", at_least=0)


@dataclass(kw_only=True)
class ReproduceOptions(Sharing):
    study: Literal["dlmi", "brain-mri", "cytology", "mnist-cases"] = required("published table; may stand first")
    output_dir: Path = required("folder for the runs and the table")
    data: str | None = option(
        None, "folder of the data; cytology: with sipakmed, mlcc, bcfc, hicervix in it", is_path=True
    )
    backbones_dir: Path | None = option(
        None,
        "folder of backbones by their names (uni, ...), for those that the Hub can't give",
        needs={"dry_run": False},
    )
    rows: list[str] = option([], "only these rows, by the names of their folders (default: all)")
    seeds: int | None = option(None, "runs of each row (default: the study's)", at_least=1)
    dry_run: bool = option(
        False, "see that each row runs, with random weights and generated images", needs={"data": None}
    )


@dataclass(kw_only=True)
class PretrainBackboneOptions:
    output_dir: Path = required("new folder for the backbone")
    steps: int = option(500, "optimizer steps, 128 images each", at_least=1)
    images: int = option(8000, "training patterns; a tenth more are held out", at_least=10)
    learning_rate: float = option(3e-3, "the peak of AdamW's cosine schedule", above=0)
    seed: int = option(0, "of weights and patterns", at_least=0)
