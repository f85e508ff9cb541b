"""Ensemble folders: several adapter folders whose mean logit is the prediction, with a threshold and temperature.

An ensemble folder holds `ensemble.json`, the members as complete adapter folders in `members/0`, `members/1`, ...,
the ensemble's predictions of each split, metrics.json, a card, and checksums of its own files; each member has its own.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub import ModelCard, ModelCardData
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from hf_histo.adapter import files as adapter_files
from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter.files import CARD, ENSEMBLE, METRICS, hashed, read_metrics
from hf_histo.adapter.model_card import HERE
from hf_histo.adapter.sidecar import Probability, Sidecar, versions
from hf_histo.errors import HistoError
from hf_histo.evaluation import calibration, ensembling, thresholds
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import documents
from hf_histo.files import CHECKSUMS, STRICT, atomic_folder, read_checksums, read_json, write_checksums, write_json
from hf_histo.training.run_folder import PREDICTIONS

MAX_MEMBERS = 100
FILES = (ENSEMBLE, CARD, METRICS, CHECKSUMS, f"{PREDICTIONS}/*.parquet")  # beside the members


def _members(names: list[str]) -> list[str]:
    if names != [f"members/{place}" for place in range(len(names))]:
        raise ValueError("expected members/0, members/1, ...")
    return names


@dataclass(frozen=True)
class Ensemble:
    """Content of `ensemble.json`.

    Attributes:
        members: the adapter folders, relative to that of the ensemble.
        threshold: smallest probability, in [0, 1], at which the second of two classes is predicted.
        thresholds: alternatives by name, as in `Sidecar`.
        temperature: number that the mean logits are divided by for calibrated probabilities.
        versions: versions of the packages that made it.
    """

    __pydantic_config__ = STRICT

    members: Annotated[list[str], Field(min_length=2, max_length=MAX_MEMBERS), AfterValidator(_members)]
    threshold: Probability = 0.5
    thresholds: dict[str, Probability] = dataclasses.field(default_factory=dict)
    temperature: Annotated[float, Field(gt=0)] = 1.0
    versions: dict[str, str] = dataclasses.field(default_factory=versions)

    def sidecar(self, first: Sidecar) -> Sidecar:
        """That of the first member, with what the ensemble decides by."""
        return dataclasses.replace(
            first, threshold=self.threshold, thresholds=self.thresholds, temperature=self.temperature
        )


def is_ensemble(folder: Path) -> bool:
    return (folder / ENSEMBLE).is_file()


def save(folder: str | Path, members: Sequence[Path]) -> dict[str, Any]:
    """Write an ensemble folder atomically, from the predictions that its members' runs left, and return its metrics.

    Temperature and threshold are fitted on the mean logits of `val`. A split that not every member predicted is left
    out.

    Args:
        folder: path, which must not exist.
        members: adapter folders of finished runs on the same data and splits, copied as they are.

    Raises `HistoError` for fewer than two members, or more than `MAX_MEMBERS`; as `adapter_folder.verify` does; for
    members of other classes, other data or other images in `val`, or that read images differently; and one without
    predictions of `val`.
    """
    if not 2 <= len(members) <= MAX_MEMBERS:
        raise HistoError(f"--adapters: found {len(members)}, expected 2 to {MAX_MEMBERS} to make an ensemble of")
    sidecars = agreeing({str(path): adapter_folder.verify(path) for path in members})
    by_split = _predictions(members)
    means = {split: ensembling.average(tables) for split, tables in by_split.items()}
    temperature = calibration.fit_temperature(means["val"])
    first = sidecars[0]
    made = Ensemble(
        [f"members/{place}" for place in range(len(members))],
        thresholds=thresholds.named(means["val"]) if first.num_outputs == 1 else {},
        temperature=temperature.value,
    )
    of_members = [read_metrics(path) for path in members]
    negative = of_members[0]["splits"]["val"]["negative"]
    reports = {split: classification.report(table, negative=negative) for split, table in means.items()}
    sizes = {name: sum(metrics["parameters"][name] for metrics in of_members) for name in ("trainable", "total")}
    metrics = {
        "members": [_about(place, sidecar) for place, sidecar in enumerate(sidecars)],
        "calibration": {"split": "val", **dataclasses.asdict(temperature)},
        "splits": reports,
        "parameters": sizes,
        "options": {"hub_license": _common([metrics["options"]["hub_license"] for metrics in of_members])},
    }
    with atomic_folder(folder) as temporary:
        for name, source in zip(made.members, members, strict=True):
            for file, path in adapter_files.files_of(source).items():
                (temporary / name / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, temporary / name / file)
        write_json(temporary / ENSEMBLE, dataclasses.asdict(made))
        write_json(temporary / METRICS, metrics)
        for split, table in means.items():
            table.write(temporary / PREDICTIONS / f"{split}.parquet")
        _card(made, sidecars, metrics, by_split, negative).save(temporary / CARD)
        write_checksums(temporary, hashed(files_of(temporary)))
        read(temporary)
    return metrics


def agreeing(sidecars: Mapping[str, Sidecar]) -> list[Sidecar]:
    """The sidecars. Raises `HistoError`, naming it, for one that can't be in an ensemble with the first."""
    (reference, first), *others = sidecars.items()
    for name, sidecar in sidecars.items():
        sidecar.require_images(name, "use it alone")
    for name, sidecar in others:
        for what, ours, its in (
            ("classes", first.label_names, sidecar.label_names),
            ("number of logits", first.num_outputs, sidecar.num_outputs),
            ("reading of images", first.preprocessing.reading, sidecar.preprocessing.reading),
            ("data (fingerprint)", first.data.fingerprint, sidecar.data.fingerprint),
        ):
            if ours != its:
                found = f"{what} is {its}, expected that of {reference}, {ours}, in an ensemble"
                raise HistoError(f"{name}: {found}; train all members on the same --data and splits")
    return list(sidecars.values())


def files_of(folder: Path) -> dict[str, Path]:
    """The files of an ensemble folder beside its members. Raises `HistoError` as `adapter_files.files_of` does."""
    return adapter_files.files_of(folder, FILES)


def read(folder: Path) -> Ensemble:
    """Check an ensemble folder, each member as `adapter_folder.verify` does, and return the content of its JSON.

    Raises `HistoError` for files that are missing, damaged, or outside the folder, and members that don't agree.
    """
    files = files_of(folder)
    try:
        read_checksums(folder, hashed(files))
        content = read_json(folder / ENSEMBLE)
        made: Ensemble = TypeAdapter(Ensemble).validate_json(json.dumps(content))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"])) or "the content"
        raise HistoError(f"{folder / ENSEMBLE}: {place} is invalid: {fault['msg']}; copy the folder again") from None
    except (OSError, ValueError) as error:
        raise HistoError(f"{folder}: {error}, expected an ensemble folder, unchanged; copy it again") from None
    agreeing({name: adapter_folder.verify(folder / name) for name in made.members})
    return made


def _predictions(members: Sequence[Path]) -> dict[str, dict[str, Predictions]]:
    """The predictions of each split that all members have, by member."""
    found = [{path.stem: path for path in (member / PREDICTIONS).glob("*.parquet")} for member in members]
    for member, files in zip(members, found, strict=True):
        if "val" not in files:
            raise HistoError(f"{member}: holds no {PREDICTIONS}/val.parquet, expected it, to fit the temperature on")
    return {
        split: {str(member): Predictions.read(files[split]) for member, files in zip(members, found, strict=True)}
        for split in found[0]
        if all(split in files for files in found)
    }


def _about(place: int, sidecar: Sidecar) -> dict[str, str]:
    return {"folder": f"members/{place}", "trained": sidecar.trained, "backbone": sidecar.backbone.title}


def _common(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else "unknown"


def _card(
    made: Ensemble,
    sidecars: Sequence[Sidecar],
    metrics: Mapping[str, Any],
    by_split: Mapping[str, Mapping[str, Predictions]],
    negative: int | None,
) -> ModelCard:
    first = sidecars[0]
    data = ModelCardData(
        library_name="peft",
        pipeline_tag="image-classification",
        license=metrics["options"]["hub_license"],
        tags=["hf_histo", "medical", "ensemble"],
    )
    headline = {}
    for split, tables in by_split.items():
        reports = [classification.report(table, negative=negative)["overall"] for table in tables.values()]
        headline[split] = [each["accuracy"]["value"] for each in reports]
    rows: list[list[object]] = [["member", "trained", "backbone", *(f"accuracy on {split}" for split in headline)]]
    for place, member in enumerate(metrics["members"]):
        rows.append(
            [member["folder"], member["trained"], member["backbone"], *(values[place] for values in headline.values())]
        )
    return ModelCard(
        documents.render(
            "ensemble.md",
            metadata=data.to_yaml(),
            title=first.title,
            here=HERE,
            rows=rows,
            ensemble=made,
            metrics=metrics,
            label_names=first.label_names,
            data=first.data,
        )
    )
