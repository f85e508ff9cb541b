"""The adapter folder: what a run leaves behind, and all that a prediction needs beside the backbone."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import pandas as pd
import xxhash
from huggingface_hub import (
    CommitOperationAdd,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel

from hf_histo.errors import HistoError
from hf_histo.evaluation import predictions as prediction_tables
from hf_histo.evaluation.reporting import documents
from hf_histo.files import CHECKSUMS, STRICT, atomic_folder, checksum, read_json, write_json
from hf_histo.models import adapters, backbones, heads
from hf_histo.transforms.augmentation import SINGLE_VIEW, TestTimeViews
from hf_histo.transforms.color_shift import ColorRange
from hf_histo.transforms.preprocessing import Preprocessing
from hf_histo.transforms.stain import CenterNormalizer

SIDECAR, CARD = "hf_histo.json", "README.md"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")  # peft's; of a "full" run, there is MODEL instead
MODEL = ("config.json", "model.safetensors")
# What this package writes into an adapter folder. Whatever else lies there is neither read nor uploaded.
FILES = (
    *(SIDECAR, CARD, CHECKSUMS, *ADAPTER, *MODEL, "preprocessor_config.json", "metrics.json", "report.html"),
    *("predictions/*.parquet", "figures/*.png"),
)
RESIZED = {
    "crop": "shorter side resized to",
    "squash": "both sides resized to",
    "pad": "longer side resized to, and the shorter one padded with the mean color below to,",
}
PACKAGES = ("hf_histo", "torch", "transformers", "peft", "timm", "datasets", "accelerate")
CARD_METRICS = {"accuracy": "accuracy", "auroc": "roc_auc", "f1": "f1"}  # as the Hub knows them
UNSEEN = "Near copies (other compression, size or color) were not looked for here: recipes/audit.py does."
HERE = "THIS_FOLDER"  # in the card's lines of code; `push` puts the repository's name there

# What the Hub's client lets out: an upload that breaks in one of its threads ends in a RuntimeError.
FAILURES = (HTTPError, OSError, ValueError, RuntimeError)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may do this"
REMEDIES: dict[int | type[BaseException], str] = {
    LocalTokenNotFoundError: _LOG_IN,
    ConnectionError: "try again; HF_HUB_DISABLE_XET=1 sends it without hf_xet",  # whose errors are of this type
    HFValidationError: "give a folder that exists, or owner/name",
    400: "correct what it names",
    401: _LOG_IN,
    403: "use a token that may write there",
    404: "check the name, the branch and, where it is private, the token",
    409: "somebody else changes it at the same time: give the same command again",
    429: "the Hub is asked too often: wait a while",
}

Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Sidecar:
    """What `hf_histo.json` holds: how to turn an image into a decision with this adapter.

    Attributes:
        method: "linear", "lora", "pca" or "full"; a "full" folder holds the whole model, not an adapter.
        label_names: classes in the order of their indices.
        num_outputs: logits of the head; 1 for a binary task, where it speaks for the second class.
        backbone: name as `backbones.locate` takes it (a local folder as its absolute path), "revision" on the Hub or
            None, the "fingerprint" of its weights and its "configuration", see `backbones.identity`.
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
        data: "name", content "fingerprint", "splits": what each holds, see `splits.composition`, and a "description" of
            the files.
        versions: of the packages that trained it.
    """

    __pydantic_config__ = STRICT

    method: Annotated[str, Field(pattern="^(linear|lora|pca|full)$")]
    label_names: Annotated[list[str], Field(min_length=2)]
    num_outputs: Annotated[int, Field(ge=1)]
    backbone: dict[str, Any]
    batch_norm: Annotated[str, Field(pattern="^(frozen|track)$")]
    preprocessing: Preprocessing
    data: dict[str, Any]
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
    def id2label(self) -> dict[int, str]:
        """The class that each logit speaks for."""
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
            color = content.pop("normalizer", None)
            if isinstance(content.get("views"), int):  # before views could be drawn: a number of those of the square
                content["views"] = {"count": content["views"]}
            sidecar: Sidecar = TypeAdapter(cls).validate_json(json.dumps(content))
            normalizer = None if color is None else CenterNormalizer.from_json(color)
        except FileNotFoundError:
            raise HistoError(f"{folder}: holds no {SIDECAR}; expected the adapter folder of a finished run") from None
        except ValidationError as error:
            raise HistoError(f"{file}: {_first(error)}; update hf_histo, or copy the adapter again") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, HistoError) as error:
            raise HistoError(f"{file}: not a description of an adapter ({type(error).__name__}: {error})") from None
        sidecar = dataclasses.replace(sidecar, normalizer=normalizer)
        sidecar._check(file)
        return sidecar

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
                "validation, a number, or --balanced of predict.py (hf_histo.evaluation.thresholds.for_share)"
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

    def _check(self, file: Path) -> None:
        """Raise `HistoError` for parts that do not go together."""
        names, views = self.label_names, self.preprocessing
        faults = {
            "label_names": len(set(names)) < len(names),
            "num_outputs": self.num_outputs not in (1, len(names)),
            "backbone": not all(isinstance(self.backbone.get(key), str) for key in ("name", "fingerprint"))
            or not isinstance(self.backbone.get("revision", 0), str | None)
            or not isinstance(self.backbone.get("configuration", {}), dict)
            or ".." in Path(self.backbone["name"]).parts,
            "preprocessing": views.image_size > views.resize_size,
        }
        for key, fault in faults.items():
            if fault:
                raise HistoError(f"{file}: {key} is {getattr(self, key)!r}, which no adapter of this package has")


def _first(error: ValidationError) -> str:
    """What pydantic found first, in a line: where, what, and what was expected."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"])) or "the content"
    return f"{place} is {str(fault['input'])[:100]!r}, which is invalid: {fault['msg']}"


def save(
    folder: str | Path,
    model: nn.Module,
    sidecar: Sidecar,
    *,
    metrics: Mapping[str, Any],
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Path] | None = None,
    cost: str = "",
) -> None:
    """Write the adapter folder whole or not at all; an older one of that name is replaced in the end.

    Args:
        folder: to write, e.g. runs/NAME/adapter.
        model: a `PeftModel`, or the whole `PreTrainedModel` of a "full" run.
        sidecar: see `Sidecar`.
        metrics: goes into metrics.json, the model card and the report; its "splits" maps each to a `metrics.report`,
            its "options" are those that decided the result.
        tables: predictions by split.
        figures: PNG files by what they show; one of a single split is named ..._SPLIT.png.
        cost: what the training took, as a sentence for the model card. It is in no other file: all others are the same
            when the run is repeated.
    """
    folder = Path(folder)
    with atomic_folder(folder) as temporary:
        if isinstance(model, PeftModel):
            config = model.peft_config["default"]
            config.base_model_name_or_path = sidecar.backbone["name"]
            config.revision = sidecar.backbone["revision"]
            adapters.save(model, temporary, batch_norm=sidecar.batch_norm)
        else:
            assert isinstance(model, PreTrainedModel)
            model.save_pretrained(temporary)
        if processor := sidecar.preprocessing.image_processor():
            processor.save_pretrained(temporary)
        color = sidecar.normalizer and sidecar.normalizer.as_json()
        write_json(temporary / SIDECAR, dataclasses.asdict(sidecar) | {"normalizer": color})
        write_json(temporary / "metrics.json", metrics)
        for split, table in tables.items():
            prediction_tables.write(temporary / "predictions" / f"{split}.parquet", table, sidecar.label_names)
        (temporary / "figures").mkdir()
        for figure in (figures or {}).values():
            shutil.copy(figure, temporary / "figures")
        page = documents.render("report.html", **_facts(sidecar, metrics, figures or {}))
        (temporary / "report.html").write_text(page, encoding="utf-8")
        model_args = getattr(model.config, "model_args", None)
        card(sidecar, metrics, figures=figures or {}, cost=cost, model_args=model_args).save(temporary / CARD)
        write_json(temporary / CHECKSUMS, _checksums(files_of(temporary)))
        verify(temporary)
        if folder.exists():
            shutil.rmtree(folder)


def files_of(folder: Path) -> dict[str, Path]:
    """The files of an adapter folder that this package writes (`FILES`), by their names in it.

    Raises `HistoError` for one that is not a regular file in the folder: a link out of it (but for those of the Hub's
    cache to its own files), a FIFO, a device.
    """
    roots = [folder.resolve()]
    if roots[0].is_relative_to(Path(constants.HF_HUB_CACHE).resolve()):
        roots.append(roots[0].parents[1] / "blobs")  # to which the files of a snapshot are links
    found = {}
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise HistoError(f"{path}: is a link to a file outside the folder, expected a file; put the file there")
        if not path.is_file():
            raise HistoError(f"{path}: is not a regular file, expected what a run wrote; copy the folder again")
        found[path.relative_to(folder).as_posix()] = path
    return found


def verify(folder: Path) -> Sidecar:
    """Check that an adapter folder has all that a prediction needs, as it was written, and return its sidecar.

    Each of `FILES` that is there must have the checksum by which it was written, but for the card, which people edit.
    Predictions, figures and reports may be missing. A folder that is older than checksums has none, and passes.

    Raises `HistoError` for a file that is missing, damaged, of another run or outside the folder.
    """
    files = files_of(folder)
    if SIDECAR not in files:
        raise HistoError(f"{folder}: holds no {SIDECAR}; expected the adapter folder of a finished run")
    if CHECKSUMS in files:
        try:
            listed = read_json(files[CHECKSUMS])["files"]
            changed = [n for n, path in files.items() if n not in (CARD, CHECKSUMS) and listed.get(n) != checksum(path)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "copy or download the folder again"
            raise HistoError(f"{files[CHECKSUMS]}: can't be read ({error}), expected checksums; {remedy}") from None
        if changed:
            raise HistoError(
                f"{files[changed[0]]}: is not as the run wrote it, expected the checksum in {CHECKSUMS}: it is damaged "
                "or of another run; copy or download the folder again"
            )
    sidecar = Sidecar.read(folder)
    if CHECKSUMS not in files and "configuration" in sidecar.backbone:  # adapters without that are older than checksums
        raise HistoError(f"{folder}: holds no {CHECKSUMS}, expected it beside {SIDECAR}; copy or download it again")
    for name in MODEL if sidecar.method == "full" else ADAPTER:
        if name not in files:
            raise HistoError(
                f"{folder}: holds no {name}, expected it in the adapter folder of a finished run; copy or download the "
                "folder again"
            )
    return sidecar


def _checksums(files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """What `CHECKSUMS` holds (see `hf_histo.files.write_checksums`), for files or their contents by name."""
    return {
        "files": {
            name: xxhash.xxh3_128_hexdigest(content) if isinstance(content, bytes) else checksum(content)
            for name, content in files.items()
            if name not in (CARD, CHECKSUMS)
        }
    }


def read_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of an adapter folder. Raises `HistoError` if it can't be read."""
    try:
        content: dict[str, Any] = read_json(folder / "metrics.json")
    except (OSError, ValueError) as error:
        raise HistoError(f"{folder / 'metrics.json'}: can't be read ({error}); the adapter folder is damaged") from None
    return content


def load(
    source: str | Path, *, revision: str | None = None, backbone: str | None = None
) -> tuple[nn.Module, Sidecar, Path]:
    """The model in evaluation mode, its sidecar, and the local folder, from an adapter folder or a Hub name.

    `backbone` names the base model where it is no longer where the run had it; its weights must be the same ones.

    Raises `HistoError` if the folder or its backbone can't be had or does not fit.
    """
    folder = fetch(source, revision)
    sidecar = verify(folder)
    whole = sidecar.method == "full"
    name = str(folder) if whole else backbone or sidecar.backbone["name"]
    model: nn.Module = backbones.load(
        name,
        sidecar.num_outputs,
        revision=None if whole else sidecar.backbone["revision"],
        image_size=sidecar.preprocessing.image_size,
        head=sidecar.head,
        keep_head=whole,
    )
    if not whole:
        assert isinstance(model, PreTrainedModel)
        if difference := backbones.difference(sidecar.backbone, backbones.identity(model)):
            raise HistoError(
                f"{source}: was trained on another backbone than {name}: {difference}; pass the original one as "
                "--backbone"
            )
        model = adapters.restore(model, folder, batch_norm=sidecar.batch_norm)
    return model.eval(), sidecar, folder


def start_from(model: nn.Module, source: str | Path, sidecar: Sidecar) -> None:
    """Give a model that is about to be trained the LoRA weights of an adapter, and none of its head.

    Raises `HistoError` unless the adapter has LoRA on the same layers, with the same ranks, of the same backbone.
    """
    folder = fetch(source)
    given = verify(folder)
    if difference := backbones.difference(given.backbone, sidecar.backbone):
        raise HistoError(
            f"--init_adapter {source}: is for the backbone {given.backbone['name']}, not {sidecar.backbone['name']}: "
            f"{difference}; expected an adapter of the same one"
        )
    if sidecar.method != "lora":
        raise HistoError(f"--init_adapter {source}: --method is {sidecar.method!r}, expected lora; leave it out")
    assert isinstance(model, PeftModel)
    adapters.start_from(model, folder)


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter: `source` itself, or the Hub's snapshot of it in the cache.

    Without a network, a snapshot that was fetched before is as good. Raises `HistoError` if there is none.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(source), revision=revision))
    except FAILURES as error:
        raise HistoError(f"adapter {source}: no such folder, and not to be had from the Hub: {_told(error)}") from None


def check_access(repository: str, *, pull_request: bool = False) -> None:
    """Ask the Hub who we are, so that hours of training don't end in a refused upload.

    Raises `HistoError` without a network or a token, where the token may only read, and where neither its owner nor one
    of the owner's organizations owns `repository` (owner/name), unless all we want there is a pull request.
    """
    try:
        validate_repo_id(repository)
        account = HfApi().whoami()
    except FAILURES as error:
        raise HistoError(f"--hub_model_id {repository}: the Hub can't be written to: {_told(error)}") from None
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HistoError(f"--hub_model_id {repository}: {account['name']}'s token may only read; {REMEDIES[403]}")
    owners = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    if repository.split("/")[0] not in owners and not pull_request:
        raise HistoError(
            f"--hub_model_id {repository}: the token is of {account['name']}, expected a repository of "
            f"{' or '.join(owners)}; to propose it to others, add --hub_create_pr"
        )


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    base_model: str | None = None,
) -> str:
    """Upload an adapter folder to the Hub as `repository` (owner/name), in one commit, and return its address.

    What the Hub has already is not sent again, so a second call goes on where the first one was cut off. Files of the
    repository that the folder does not have stay there; files of the folder that no run writes stay here (`FILES`).
    The card's lines of code get the repository's name, and no path of this machine is uploaded: a backbone that was a
    local folder goes by that folder's name alone.

    Args:
        folder: of a finished run; it is only read.
        repository: made where it is missing, unless a pull request is wanted.
        private: of a new repository; an existing one stays as it is.
        revision: branch to write, made where it is missing.
        pull_request: propose the commit instead, and return the address of the pull request.
        base_model: name on the Hub (owner/name) of a backbone that was a local folder.

    Raises `HistoError` if the folder is no adapter's or the Hub refuses; the same call tries again.
    """
    folder = Path(folder)
    contents = in_public(folder, repository, base_model)
    api = HfApi()
    try:
        if not pull_request:
            api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # the predictions
            commit = api.create_commit(
                repository,
                [CommitOperationAdd(name, content) for name, content in contents.items()],
                commit_message="Upload hf_histo adapter",
                revision=revision,
                create_pr=pull_request,
            )
    except FAILURES as error:
        again = f"python recipes/push.py --adapter {folder} --hub_model_id {repository}"
        again += " --hub_private" if private else ""
        again += f" --hub_revision {revision}" if revision else ""
        again += " --hub_create_pr" if pull_request else ""
        again += f" --hub_base_model {base_model}" if base_model else ""
        raise HistoError(
            f"--hub_model_id {repository}: the upload failed: {_told(error)}. {folder} is whole; once that is done, "
            f"{again} goes on"
        ) from None
    return str(commit.pr_url or commit.repo_url)


def in_public(folder: Path, here: str, base_model: str | None = None) -> dict[str, Path | bytes]:
    """What is uploaded of an adapter folder, by name: `files_of` it, those that name places as text without them.

    No path of this machine is left. The card's lines of code say `here`; a backbone that was a local folder goes by
    `base_model`, its name on the Hub, or else by that folder's name alone: the fingerprint shows if it is another one.
    The checksums are of what is uploaded.

    Raises `HistoError` as `verify` and `files_of` do, and for a `base_model` where the backbone has a name.
    """
    name = verify(folder).backbone["name"]
    is_local = Path(name).is_absolute()
    if base_model and not is_local:
        raise HistoError(f"--hub_base_model {base_model}: the backbone is known as {name} already; leave it out")
    public = base_model or Path(name).name if is_local else name
    contents: dict[str, Path | bytes] = {**files_of(folder)}
    texts = {}
    for file, quoted in {CARD: repr, SIDECAR: json.dumps, "adapter_config.json": json.dumps}.items():
        if isinstance(path := contents.get(file), Path):
            texts[file] = path.read_text(encoding="utf-8").replace(quoted(name), quoted(public))
    if CARD in texts:
        texts[CARD] = texts[CARD].replace(HERE, here)
        if base_model:
            texts[CARD] = texts[CARD].replace("---\n", f"---\nbase_model: {base_model}\n", 1)
    contents |= {file: text.encode() for file, text in texts.items()}
    return contents | {CHECKSUMS: json.dumps(_checksums(contents), indent=2).encode()}


def _told(error: BaseException) -> str:
    """What the Hub said or why it could not be asked, and the remedy, in one line that never holds the token."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set, and it is not in the cache; unset that to ask the Hub"
    told = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    if told is None:
        said, remedy = f"{type(chain[-1]).__name__}: {chain[-1]}", REMEDIES.get(type(chain[-1]), "try again")
    else:
        status = told.response.status_code
        said = f"status {status}" + (f", {told.server_message}" if told.server_message else "")
        remedy = REMEDIES.get(status, "the fault is the Hub's: try again later")
    said = " ".join(said.split())[:300]
    return f"{said.replace(get_token() or chr(0), '***')}; {remedy}"


def card(
    sidecar: Sidecar,
    metrics: Mapping[str, Any],
    *,
    figures: Mapping[str, Path] | None = None,
    cost: str = "",
    model_args: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The model card, from measured facts; arguments as for `save`, and those that timm builds the backbone with."""
    facts = _facts(sidecar, metrics, figures or {})
    name = sidecar.backbone["name"]
    dataset = str(sidecar.data["name"])
    data = ModelCardData(
        library_name="peft" if sidecar.method != "full" else "transformers",
        pipeline_tag="image-classification",
        base_model=None if Path(name).is_absolute() or name == "builtin" else name,
        license=metrics["options"]["hub_license"],
        tags=["hf_histo", "medical", sidecar.method],
        model_name=facts["title"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=split,
                metric_type=kind,
                metric_name=metric,
                metric_value=values["overall"][metric]["value"],
            )
            for split, values in metrics["splits"].items()
            for metric, kind in CARD_METRICS.items()
            if values["overall"][metric]["value"] is not None
        ]
        or None,
    )
    return ModelCard(
        documents.render(
            "card.md",
            metadata=data.to_yaml(),
            base="str(hf_histo.models.backbones.BUILTIN)" if name == "builtin" else repr(name),
            here=HERE,
            resized=RESIZED[sidecar.preprocessing.fit],
            cost=cost,
            model_args=dict(model_args or {}),
            is_local=Path(name).is_absolute(),
            **facts,
        )
    )


def _facts(sidecar: Sidecar, metrics: Mapping[str, Any], figures: Mapping[str, Path]) -> dict[str, Any]:
    """What the card and the report tell, each in its format."""
    name, splits, names = sidecar.backbone["name"], sidecar.data["splits"], sidecar.label_names
    hidden = any(held["hidden"] for held in splits.values())
    header = ["", "images", "groups", *sidecar.label_names, *(["hidden"] if hidden else []), "centers (images)"]
    rows = [
        [
            split,
            held["images"],
            held["groups"] or None,
            *held["classes"].values(),
            *([held["hidden"]] if hidden else []),
            ", ".join(f"{center} ({count:,})" for center, count in held["centers"].items()) or None,
        ]
        for split, held in splits.items()
    ]
    return {
        "title": f"{' / '.join(names) if len(names) < 4 else f'{len(names)} classes'} on {sidecar.data['name']}",
        "decision": "The most probable class is predicted."
        if sidecar.num_outputs > 1
        else f"{names[1]} is predicted from a probability of {sidecar.threshold} on.",
        "backbone": Path(name).name if Path(name).is_absolute() else name,
        "sidecar": sidecar,
        "metrics": metrics,
        "figures": figures,
        "options": metrics["options"],
        "data_rows": list(zip(header, *rows, strict=True)),
        "leaks": [*_leaks(splits), *([] if sidecar.data.get("near_copies_searched") else [UNSEEN])],
    }


def _leaks(splits: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What is known of training data in the other splits, in sentences."""
    seen = splits["train"]["centers"].keys()
    for split, held in splits.items():
        if split == "train":
            continue
        if "copies_of_train" not in held:
            yield f"{split}: not compared with the training images, which were streamed."
            continue
        copies, groups = held["copies_of_train"], held["groups_of_train"]
        yield (
            f"{split}: "
            + ", ".join(
                [
                    f"{copies:,} of {held['images']:,} images are byte for byte also in train"
                    if copies
                    else "no image is byte for byte one of train",
                    f"{groups:,} of {held['groups']:,} groups are also in train"
                    if groups
                    else "no group is also in train"
                    if held["groups"]
                    else "groups are unknown",
                    f"centers that train has not seen: {', '.join(sorted(held['centers'].keys() - seen)) or 'none'}"
                    if held["centers"]
                    else "centers are unknown",
                ]
            )
            + "."
        )
