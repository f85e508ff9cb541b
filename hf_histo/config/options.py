"""The options of a run, one dataclass per group; an option's bounds, choices and role stand at its definition."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from hf_histo.errors import HistoError
from hf_histo.files import require_output

Method = Literal["linear", "lora", "full", "pca"]
AdapterName = Literal[
    "lora",
    "dora",
    "loha",
    "lokr",
    "hira",
    "hra",
    "boft",
    "oft",
    "ia3",
    "ln_tuning",
    "beft",
    "vera",
    "vblora",
    "fourierft",
    "waveft",
    "c3a",
    "road",
    "miss",
    "delora",
    "gralora",
    "glora",
    "deft",
    "peanut",
    "tinylora",
    "unilora",
]
BatchNorm = Literal["frozen", "track"]
Fit = Literal["crop", "squash", "pad"]
Contrast = Literal["none", "clahe", "stretch"]
Normalization = Literal["none", "rgb", "reinhard", "macenko"]

Role = Literal["result", "source", "place", "speed", "output"]


SYNTHETIC, HUB = "synthetic", "hub:"  # values of --data: the built-in images, and the start of a name on the Hub


@dataclass(frozen=True)
class Except:
    """In `needs`: any value but these."""

    values: tuple[str, ...]


SET = "set"  # in `needs`: anything but the default
LORA = {"method": "lora"}
# Of the methods of peft (`hf_histo.models.peft_methods`), those that an option acts with.
PLAIN_OR_DORA = LORA | {"adapter": ("lora", "dora")}
GRADIENT = {"method": ("linear", "lora", "full")}  # training in steps, which pca has none of
IMAGES = {"aggregation": "none"}  # each image has a label and a prediction of its own
BAGS = {"aggregation": SET}
PUSHED = {"push_to_hub": True}
WARMED_UP = {"lr_scheduler_type": Except(("constant", "reduce_lr_on_plateau"))}  # transformers starts these at once


@dataclass(frozen=True)
class Rule:
    """What an option allows and what it is for.

    Attributes:
        above: its values are larger.
        at_least: they are this or larger.
        below: they are smaller.
        at_most: they are this or smaller.
        role: "result": decides what comes out of a run; "source": that, too, and is recorded elsewhere, without its
            place on this machine (data, backbone); "place": where something lies; "speed": how fast a run goes;
            "output": what is written besides the result.
        needs: the values that other options must have for this one to act: one value, a tuple of them, `Except`,
            or `SET`.
        exempt: values that are true whatever `needs` asks for, e.g. no warm-up.
        bare: the value where the option is given without one; None if it needs one.
        is_path: whether it may be a path, which a shell completes.
        common: whether `--help` shows it; `--help_all` shows every option.
        details: what `--help_all` adds to the help text.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    role: Role = "result"
    needs: Mapping[str, Any] = field(default_factory=dict)
    exempt: tuple[Any, ...] = ()
    bare: Any = None
    is_path: bool = False
    common: bool = False
    details: str = ""

    def expected(self) -> str:
        """The bounds in words, e.g. "at least 0 and below 1"."""
        bounds = {"more than": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)

    def allows(self, value: Any) -> bool:
        """Whether a value, perhaps None, is within the bounds; a number must be finite."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return value is None or (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )


def option(default: Any, help: str, **rule: Any) -> Any:
    """A dataclass field with its default, its line in `--help`, and the fields of its `Rule`."""
    metadata = {"help": help, "rule": Rule(**rule)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str, **rule: Any) -> Any:
    """A dataclass field that must be given, with its line in `--help`, and the fields of its `Rule`."""
    return field(metadata={"help": help, "rule": Rule(**rule)})


def same(of: type, name: str, help: str | None = None) -> Any:
    """A dataclass field with the default, rule and, unless `help` replaces it, help text of option `name` of `of`."""
    (found,) = (each for each in dataclasses.fields(of) if each.name == name)
    return field(default=found.default, metadata={**found.metadata, "help": help or found.metadata["help"]})


def rule_of(of: dataclasses.Field[Any]) -> Rule:
    """The rule of an option; that of a plain field with a help text allows everything."""
    found: Rule = of.metadata.get("rule", Rule())
    return found


@dataclass(kw_only=True)
class TableOptions:
    """How image files, and a table of them, are read; see `data.reading` and `data.readers.image_table`."""

    image_root: str | None = option(
        None,
        "folder that the image paths of a table are relative to (default: the table's)",
        role="place",
        is_path=True,
    )
    image_column: str | None = option(None, "column of image paths in a table (default: by its usual names)")
    slide_column: str | None = option(None, "column of slides, in a table of slides")
    annotations_column: str | None = option(
        None, "column of their annotations (default: the .geojson beside a slide; 'none': labels of slides alone)"
    )
    label_column: str | None = option(None, "column of labels, as text or numbers")
    id_column: str | None = option(None, "column of image ids (default: the path)")
    split_column: str | None = option(None, "column of train, val or test ('none': new splits)")
    center_column: str | None = option(None, "column of centers, as names or numbers")
    group_column: str | None = option(None, "column of patients or slides, which are never on both sides of a split")
    page: int | None = option(
        None, "page of TIFF files with several, or frame of DICOM files, from 1 (default: refused)", at_least=1
    )
    window: str | None = option(
        None, "gray values of DICOM files to show, as CENTER,WIDTH, e.g. --window=-600,1500 (default: the file's)"
    )


def columns_of(options: TableOptions) -> dict[str, Any]:
    """The options by which image files, and a table of them, are read, for another dataclass with them."""
    return {option.name: getattr(options, option.name) for option in dataclasses.fields(TableOptions)}


@dataclass
class DataOptions(TableOptions):
    _argument_group_name = "data"

    data: str = option(
        SYNTHETIC,
        "folder, table of images, or hub:OWNER/NAME",
        role="source",
        is_path=True,
        common=True,
    )
    split: Literal["files", "published", "clean"] = option(
        "files",
        "splits of the files, searched for copies, or made anew",
        details="'files': as they are; 'published': searched for copies, val taken from train if it is missing, and "
        "test_clean, the test images with no copy in training; 'clean': one image of each family of copies, split anew",
        common=True,
    )
    family: Literal["copies", "near"] | None = option(
        None,
        "images that stay on one side: copies, or near images as well, such as "
        "neighboring slices of a volume (default: copies; near in cross-validate)",
        needs={"split": ("published", "clean")},
    )
    test_centers: str | None = option(
        None,
        "centers to hold out as test, by name or number, separated by commas",
        details="val is made of the others where it is missing",
        needs={"split": "files", "streaming": False},
    )
    negative_class: str | None = option(None, "class that means 'nothing found', for sensitivity at a specificity")
    cache_dir: str | None = option(
        None, "folder of the converted data (default: the datasets library's cache)", role="place", is_path=True
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error", "stop at an image file that can't be read, or leave it out"
    )
    gray_bits: int | None = option(
        None,
        "bits of 16-bit gray image files, 8 to 16 (default: the fewest of 8, 10, 12, 14, 16 that hold all images)",
        at_least=8,
        at_most=16,
    )
    slice_plane: Literal["axial", "coronal", "sagittal"] = option("axial", "how volumes (NIfTI) are cut into slices")
    slices: int | None = option(
        None, "of a volume, evenly spaced (default: all that the head fills well enough)", above=0
    )
    mpp: float | None = option(
        None, "micrometers per pixel of the patches of slides (default: 0.5, or the adapter's)", above=0
    )
    patch_size: int | None = option(
        None, "pixels on a side of the patches of slides (default: 224, or the adapter's)", at_least=16, at_most=4096
    )
    stride: int | None = option(
        None, "pixels from one patch of a slide to the next (default: --patch_size)", above=0, at_most=4096
    )
    min_tissue: float = option(
        0.25,
        "least share of a slide's patch that is tissue, by Otsu's threshold; 0: all patches",
        at_least=0,
        at_most=1,
    )
    min_overlap: float = option(
        0.5, "share of a slide's patch that annotations of a class must cover for its label", above=0, at_most=1
    )
    unannotated: str | None = option(
        None, "class of patches that no annotation touches, on slides with annotations (default: left out)"
    )
    max_patches: int | None = option(
        None, "patches of each class of a slide, drawn at random, always the same (default: all)", above=0
    )
    assume_mpp: float | None = option(
        None, "micrometers per pixel of slides that do not state theirs (default: refused)", above=0
    )
    store_patches: bool = option(
        False, "copy the patches of slides once, rather than read the slides whenever one is needed", role="speed"
    )
    streaming: bool = option(
        False, "with hub:..., read training images as they are needed, and keep none", needs=IMAGES
    )
    pixel_order: Literal["detect", "hwc", "chw"] = option("detect", "order of the columns in a table of pixels")
    pixel_range: Literal["detect", "1", "255"] = option("detect", "largest value in a table of pixels")
    num_workers: int = option(0, "processes that read batches beside each training process", at_least=0, role="speed")


@dataclass
class ProtocolOptions:
    _argument_group_name = "protocol"

    shots: int | None = option(
        None,
        "training images of each class (default: all)",
        details="and at most 4 to validate on",
        above=0,
        needs=IMAGES,
        common=True,
    )
    percentage: float | None = option(
        None,
        "train and validate on that share of each class, above 0 up to 100",
        above=0,
        at_most=100,
        needs=IMAGES,
    )
    level: int | None = option(
        None, "level of a hierarchy of classes, 1 for the coarsest (default: the finest)", above=0
    )
    iterations_per_shot: int | None = option(
        None,
        "with --shots: so many updates for each shot, and those of the warm-up, instead of passes",
        above=0,
        needs=GRADIENT,
    )


@dataclass
class ModelOptions:
    _argument_group_name = "model"

    backbone: str = option(
        "builtin", "'builtin', a local folder, a timm name, or OWNER/NAME", role="source", is_path=True, common=True
    )
    revision: str | None = option(None, "branch, tag or commit of a backbone from the Hub", role="source")
    random_weights: bool = option(False, "build the backbone without its weights, for checks without a network")
    head: Literal["linear", "mlp"] = option("linear", "classifier: a linear layer, or hidden ones with ReLU before it")
    head_widths: str = option("512,256", "outputs of the hidden layers of an mlp", needs={"head": "mlp"})
    head_on: Literal["features", "logits"] = option(
        "features", "replace the backbone's output layer, or keep it below", needs=IMAGES
    )
    train_output_layer: bool = option(False, "train the backbone's output layer as well", needs={"head_on": "logits"})
    head_softmax: bool = option(
        False, "end the classifier in a softmax before the loss, which has its own: to compare", needs=IMAGES
    )
    aggregation: Literal["none", "abmil", "mean", "max"] = option(
        "none",
        "one label and one prediction for each slide, or group of images: by gated attention (ABMIL), mean or max",
        needs={"method": ("linear", "lora")},
    )
    attention_width: int = option(
        128, "units of the gated attention", above=0, at_most=65536, needs={"aggregation": "abmil"}
    )
    text_prompt: str | None = option(
        None,
        "CLIP: start the classifier from this sentence about each class, e.g. 'a slide showing a {} cell'",
        needs=GRADIENT | IMAGES,
    )
    probe_first: bool = option(
        False,
        "start the classifier from a logistic regression on the backbone's features (LP-FT)",
        needs={
            "method": ("lora", "full"),
            "head": "linear",
            "head_on": "features",
            "head_softmax": False,
            "text_prompt": None,
            "streaming": False,
            **IMAGES,
        },
    )
    head_dropout: float = option(
        0.0, "dropout before each linear layer of the classifier, in [0, 1)", at_least=0, below=1, needs=GRADIENT
    )
    patch_dropout: float = option(
        0.0,
        "share of the patches that each training step leaves out, in [0, 1), for vision transformers of timm",
        at_least=0,
        below=1,
        needs=GRADIENT,
    )
    batch_norm: BatchNorm = option(
        "frozen", "keep batch-norm statistics, or let them follow the data", needs=GRADIENT | IMAGES
    )
    image_size: int | None = option(None, "pixels on a side (default: the backbone's)", above=0, common=True)
    resize_size: int | None = option(
        None, "pixels of the resize before the center crop (default: the backbone's)", above=0
    )
    fit: Fit | None = option(None, "how images become square (default: the backbone's)")


@dataclass
class AdapterOptions:
    _argument_group_name = "adapter"

    method: Method = option(
        "lora",
        "what is trained",
        details="the classifier, LoRA as well, or all; pca: logistic regression on principal components",
        common=True,
    )
    adapter: AdapterName = option("lora", "method of peft", needs=LORA)
    target_modules: str | None = option(
        None,
        "layers with the adapter (default: by architecture)",
        details="a preset or regex",
        needs=LORA | {"adapter": Except(("ln_tuning",))},
        common=True,
    )
    lora_blocks: Literal["all", "bottom", "mid", "up", "half-bottom", "half-up", "top3"] = option(
        "all",
        "transformer blocks with the adapter: a third, a half, or the last three",
        needs=LORA | {"adapter": Except(("ln_tuning",))},
    )
    lora_rank: int = option(
        8,
        "rank of the update",
        above=0,
        needs=LORA
        | {"adapter": Except(("boft", "oft", "ia3", "ln_tuning", "beft", "fourierft", "waveft", "c3a", "road"))},
        common=True,
    )
    lora_alpha: float = option(
        16.0,
        "scale of the update: alpha / rank, or alpha / sqrt(rank) with rsLoRA",
        above=0,
        needs=LORA | {"adapter": ("lora", "dora", "loha", "lokr", "gralora")},
    )
    lora_dropout: float = option(
        0.0,
        "dropout on the input of the update, in [0, 1)",
        at_least=0,
        below=1,
        needs=LORA | {"adapter": ("lora", "dora", "hira", "vera", "vblora", "gralora", "unilora")},
    )
    use_rslora: bool = option(False, "rank-stabilized scale", needs=PLAIN_OR_DORA)
    block_size: int = option(
        4,
        "rows and columns of each block of the update; it must divide a layer's size",
        above=0,
        needs=LORA | {"adapter": ("boft", "oft", "c3a", "road")},
    )
    num_frequencies: int = option(
        1000, "trained coefficients of each layer", above=0, needs=LORA | {"adapter": ("fourierft", "waveft")}
    )
    update_scale: str = option(
        "1",
        "number in [0, 1] by which the trained update is multiplied, or auto: the best of 0, 0.1, ..., 1 on val",
        needs=LORA
        | {
            "adapter": (
                *("lora", "loha", "lokr", "hira", "beft", "vera", "fourierft", "waveft", "c3a", "miss", "delora"),
                "gralora",
            ),
            "batch_norm": "frozen",
            "init_lora_weights": ("default", "gaussian"),  # the others take a part out of the backbone's weights
        },
    )
    init_adapter: str | None = option(
        None,
        "adapter of another data set whose weights, but the head's, to start from: folder or Hub",
        needs=LORA,
        is_path=True,
    )
    init_lora_weights: str = option(
        "default",
        "initializer: default (A Kaiming, B zero), gaussian, pissa, ...",
        needs=PLAIN_OR_DORA | {"init_adapter": None},
    )

    @property
    def name(self) -> str:
        """What is trained, for titles: the method, and for an adapter that of peft."""
        return self.adapter if self.method == "lora" else self.method


@dataclass
class PreparationOptions:
    """Of each image when it is read, in training and prediction alike: see `hf_histo.transforms.mri.Preparation`."""

    _argument_group_name = "preparation"

    gray: bool = option(False, "take out color")
    crop_to_brain: bool = option(False, "cut off the background around the head")
    even_field: bool = option(False, "divide out slow changes of brightness (bias field)")
    contrast: Contrast = option("none", "equalize locally, or stretch the histogram")


@dataclass
class AugmentationOptions:
    _argument_group_name = "augmentation"

    augmentation: str = option(
        "crop-jitter",
        "a preset",
        details="none, flips, resized-crop, crop-jitter, affine, strong, mri",
        needs=GRADIENT,
        exempt=("none",),
        common=True,
    )
    training_views: int | None = option(
        None, "views of an image that epochs take in turn (default: always a new one)", above=0, needs=GRADIENT
    )
    mixup_alpha: float = option(
        0.0,
        "blend each training image with another of its center, by a share drawn from Beta(alpha, alpha); 0: off",
        at_least=0,
        needs=GRADIENT | IMAGES,
    )
    cutmix_alpha: float = option(
        0.0,
        "as mixup, with a box of the other image whose area is its share; with both on, an image gets one of them",
        at_least=0,
        needs=GRADIENT | IMAGES,
    )


@dataclass
class CenterOptions:
    _argument_group_name = "centers"

    normalization: Normalization = option(
        "none", "take out each center's color", needs={"streaming": False}, common=True
    )
    stain_mixing: float = option(
        0.0,
        "probability of training on a mixture of the centers' colors, in [0, 1]",
        at_least=0,
        at_most=1,
        needs=GRADIENT | {"normalization": SET, "streaming": False},
    )
    virtual_stain: float = option(
        0.0,
        "probability of training on a virtual stain, drawn around the centers' colors (RandStainNA), in [0, 1]",
        at_least=0,
        at_most=1,
        needs=GRADIENT | {"normalization": ("rgb", "reinhard")},
    )
    pool_centers: bool = option(False, "train on all labeled centers, validate on a tenth of their groups")
    balance_centers: bool = option(False, "draw every training center equally often", needs=GRADIENT)
    domain_loss: Literal["none", "group_dro", "coral", "dann"] = option(
        "none", "raise hard centers, or make their features alike", needs=GRADIENT | IMAGES
    )
    domain_weight: float = option(
        1.0,
        "weight of the CORAL or DANN penalty; for GroupDRO, its step size times 100",
        at_least=0,
        needs={"domain_loss": SET},
    )


@dataclass
class PredictionOptions:
    """What changes nothing of the training: runs that differ in these alone could share an adapter."""

    _argument_group_name = "prediction"

    test_time_views: int = option(
        1, "views whose mean logit is a prediction: 1, or 8 of the square, or any number drawn"
    )
    test_time_augmentation: str = option(
        "square", "every turn and flip of the square, or a preset of --augmentation", needs={"test_time_views": SET}
    )
    adapt_batch_norm: bool = option(
        False,
        "predict with batch-norm statistics of the images that are predicted; for --batch_norm track: frozen ones are "
        "those of the backbone's own images, and a model that was trained with them loses accuracy",
    )


@dataclass
class TrainingOptions:
    _argument_group_name = "training"

    seed: int = option(
        0,
        "of all that is random",
        details="the head, the adapter, the order and the augmentation",
        at_least=0,
        at_most=2**32 - 1,
        common=True,
    )
    num_train_epochs: float = option(
        10.0, "passes over the training set", above=0, needs=GRADIENT | {"max_steps": None}, common=True
    )
    max_steps: int | None = option(None, "updates, instead of passes", above=0, needs=GRADIENT)
    eval_steps: float | None = option(
        None, "updates between evaluations, or their share if below 1 (default: a pass)", above=0, needs=GRADIENT
    )
    per_device_train_batch_size: int = option(
        32, "images or bags per device and step", above=0, needs=GRADIENT, common=True
    )
    bag_size: int = option(
        512,
        "images of a bag that a training step draws at random, anew in each epoch; of smaller bags, all",
        above=0,
        needs=BAGS,
    )
    per_device_eval_batch_size: int = option(64, "evaluation images per device and step", above=0, role="speed")
    gradient_accumulation_steps: int | None = option(
        None, "steps per update (default: the launcher's setting, or 1)", above=0, needs=GRADIENT
    )
    optimizer: Literal["adam", "adamw", "sgd"] = option(
        "adam", "adam couples weight decay to the gradient", needs=GRADIENT
    )
    learning_rate: float = option(1e-3, "initial learning rate", above=0, needs=GRADIENT, common=True)
    lora_plus_ratio: float = option(
        1.0,
        "learning rate of the matrices B over that of A and of the classifier (LoRA+)",
        at_least=1,
        needs=PLAIN_OR_DORA,
    )
    weight_decay: float = option(1e-4, "weight decay", at_least=0, needs=GRADIENT)
    lr_scheduler_type: str = option(
        "cosine", "any scheduler name of transformers, e.g. reduce_lr_on_plateau", needs=GRADIENT
    )
    lr_scheduler_patience: int = option(
        5,
        "epochs without progress before the plateau scheduler divides by 10",
        at_least=0,
        needs=GRADIENT | {"lr_scheduler_type": "reduce_lr_on_plateau"},
    )
    warmup_steps: float = option(
        0.1,
        "steps of warm-up, or a share of all steps if below 1",
        at_least=0,
        needs=GRADIENT | WARMED_UP,
        exempt=(0,),
    )
    weight_averaging: Literal["none", "ema", "dense"] = option(
        "none",
        "what is validated and saved: the weights of the last update, their exponential moving average, or the mean of "
        "the weights after each update",
        needs=GRADIENT,
    )
    ema_decay: float = option(
        0.99,
        "of the moving average, in [0, 1): about 1 / (1 - decay) updates count; less in the first updates",
        at_least=0,
        below=1,
        needs=GRADIENT | {"weight_averaging": "ema"},
    )
    averaging_start: float = option(
        0.25,
        "share of the updates before the dense mean starts, in [0, 1)",
        at_least=0,
        below=1,
        needs=GRADIENT | {"weight_averaging": "dense"},
    )
    early_stopping_patience: int = option(
        10, "epochs without progress before training stops; 0: never", at_least=0, needs=GRADIENT
    )
    metric_for_best_model: str = option("auroc", "validation metric that chooses the checkpoint: auroc, accuracy, loss")
    class_balance: Literal["weights", "sampling", "none"] = option(
        "weights",
        "against class imbalance: weight the loss, or draw every class equally often",
        needs=GRADIENT,
        exempt=("none",),
    )
    label_smoothing: float = option(
        0.0,
        "share of each training label that is spread evenly over all classes, in [0, 1)",
        at_least=0,
        below=1,
        needs=GRADIENT,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "folder of a checkpoint, or 'last' (the default in a begun run)",
        role="place",
        needs=GRADIENT,
        is_path=True,
    )
    logging_steps: int = option(10, "updates between two lines of the training log", above=0, needs=GRADIENT)


@dataclass
class SpeedOptions:
    _argument_group_name = "speed"

    cache_features: Literal["auto", "on", "off"] = option(
        "auto",
        "run what is frozen below the first trained layer once per view, and train on what it gave; auto: if "
        "that is half of the work or more, and changes no result",
        role="speed",
        needs=GRADIENT,
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto",
        "arithmetic of training; auto: the launcher's, else bf16 on a GPU that has it, else float32",
        needs=GRADIENT,
        exempt=("no",),
    )
    activation_checkpointing: bool = option(
        False,
        "compute activations again for the gradient: less memory, more time",
        role="speed",
        needs={"method": ("lora", "full")},
    )
    chunk_size: int = option(
        64,
        "images of bags whose activations are in memory at a time: the gradient is computed chunk by chunk",
        above=0,
        role="speed",
        needs=BAGS,
    )
    torch_compile: bool = option(False, "compile the model, for minutes, into faster steps", needs=GRADIENT | IMAGES)


@dataclass
class OutputOptions:
    _argument_group_name = "output"

    output_dir: str | None = option(
        None,
        "folder of the run",
        details="(default: runs/DATA-BACKBONE-METHOD-seedN)",
        role="place",
        is_path=True,
        common=True,
    )
    overwrite_output_dir: bool = option(
        False, "delete a finished run in the folder, or one with other options", role="output"
    )
    preview: bool = option(
        False,
        "before training, draw preview.png: what training makes of some images",
        details="which --report_to shows as well",
        role="output",
        needs=GRADIENT,
    )
    explain: bool = option(
        False, "draw explanations.png: where the model sees the class it predicts on val", role="output", needs=IMAGES
    )
    robustness: bool = option(
        False,
        "measure whether the features know the center rather than the class, before and after training",
        details="on the images of val and test; see docs/explanation/centers.md",
        role="output",
        needs=IMAGES,
    )
    report_to: str = option(
        "none",
        "trackers, e.g. tensorboard,wandb",
        details="any of transformers: trackio, tensorboard, wandb, mlflow, ...; 'all': those that are installed",
        role="output",
        needs=GRADIENT,
        exempt=("none",),
        common=True,
    )
    run_name: str | None = option(
        None, "name of the run there (default: by its folder)", role="output", needs={"report_to": SET}
    )
    verbose: bool = option(
        False, "show every warning of the libraries, also those that call for no action", role="output"
    )
    push_to_hub: bool = option(False, "upload the adapter folder at the end", role="output", common=True)
    hub_model_id: str | None = option(None, "repository on the Hub: owner/name", role="output", needs=PUSHED)
    hub_base_model: str | None = option(
        None, "name there (owner/name) of a backbone that was a local folder", role="output", needs=PUSHED
    )
    hub_license: str = option("unknown", "license in the model card, by its identifier on the Hub, e.g. apache-2.0")
    hub_private: bool = option(
        False, "create the repository as private", role="output", needs=PUSHED | {"hub_create_pr": False}
    )
    hub_revision: str | None = option(
        None, "branch of it to write to, made where it is missing (default: main)", role="output", needs=PUSHED
    )
    hub_create_pr: bool = option(False, "open a pull request there instead of writing", role="output", needs=PUSHED)


# What is best on validation for training images of several centers, and for LoRA on the built-in backbone, see
# docs/results/builtin.md: the defaults of a fine-tuning without `--config`. Experiments, and configs, which state what
# they change, start from the defaults of the options.
FOR_CENTERS: Mapping[str, Any] = {"normalization": "rgb", "stain_mixing": 0.5, "test_time_views": 8}
BUILTIN_LEARNING_RATE = 3e-3


@dataclass
class Config:
    """Everything that decides a run's result.

    `unchosen` names the options that have their values by `FOR_CENTERS` alone: the run takes their defaults instead
    where its training images are not of several centers.
    """

    data: DataOptions = field(default_factory=DataOptions)
    protocol: ProtocolOptions = field(default_factory=ProtocolOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    preparation: PreparationOptions = field(default_factory=PreparationOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    centers: CenterOptions = field(default_factory=CenterOptions)
    prediction: PredictionOptions = field(default_factory=PredictionOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    unchosen: frozenset[str] = frozenset()

    def flat(self) -> dict[str, Any]:
        """All options in one mapping: what a YAML file for `--config` holds."""
        return {key: value for name in GROUPS for key, value in vars(getattr(self, name)).items()}

    def title(self) -> str:
        """The run in one line: method, backbone, data and seed."""
        return f"{self.adapter.name}: {self.model.backbone} on {self.data.data}, seed {self.training.seed}"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """The config whose `flat` is `values`."""
        return cls(
            **{
                group: kind(**{option.name: values[option.name] for option in dataclasses.fields(kind)})
                for group, kind in GROUPS.items()
            }
        )

    def recorded(self) -> dict[str, Any]:
        """The options with an effect on the result, without data, backbone and paths of this machine."""
        recorded = {key: value for key, value in self.flat().items() if key in with_role("result")}
        start = recorded["init_adapter"]
        if start and (folder := Path(start).expanduser()).is_dir():
            recorded["init_adapter"] = "/".join(folder.resolve().parts[-2:])  # RUN/adapter
        return recorded

    def at(self, output_dir: str | Path, seed: int) -> Config:
        """The same options for a run of its own: another folder and seed."""
        return dataclasses.replace(
            self,
            training=dataclasses.replace(self.training, seed=seed),
            output=dataclasses.replace(self.output, output_dir=str(output_dir)),
        )

    def parent_folder(self) -> Path:
        """`--output_dir`, where it is to hold several runs.

        Raises `HistoError` where it is not given, or is a link or a file, and for options that are of one run.
        """
        if self.output.output_dir is None:
            raise HistoError("--output_dir is not given, expected a folder for the runs")
        for name, value in (
            ("push_to_hub", self.output.push_to_hub),
            ("resume_from_checkpoint", self.training.resume_from_checkpoint),
            ("run_name", self.output.run_name),
        ):
            if value:
                raise HistoError(
                    f"--{name} is {value!r}, which is for one run and not for several; leave it out (begun runs resume "
                    "by themselves)"
                )
        require_output(self.output.output_dir, folder=True)
        return Path(self.output.output_dir)


# The dataclasses of options by their names in `Config`.
GROUPS: Mapping[str, Any] = {name: kind for name, kind in get_type_hints(Config).items() if name != "unchosen"}
# Every option of `Config` by its name, which is that of its flag as well.
OPTIONS: Mapping[str, dataclasses.Field[Any]] = {
    option.name: option for group in GROUPS.values() for option in dataclasses.fields(group)
}
RULES: Mapping[str, Rule] = {name: rule_of(option) for name, option in OPTIONS.items()}


def with_role(*roles: Role) -> frozenset[str]:
    """The names of the options with one of these roles."""
    return frozenset(name for name, rule in RULES.items() if rule.role in roles)


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, of this version or an earlier one, by the names of today."""
    values = dict(values)
    if values.pop("use_dora", False) in (True, "true", "True"):
        values["adapter"] = "dora"
    return values


# Runs that differ in these alone have the same result.
NON_RESULT_OPTIONS = with_role("place", "speed", "output")
