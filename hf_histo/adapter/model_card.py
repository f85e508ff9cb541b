"""The model card of an adapter folder, and the values that card and report show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import OPTIONS
from hf_histo.data.splits.checks import Composition
from hf_histo.evaluation import decisions
from hf_histo.evaluation.reporting import documents

RESIZED = {
    "crop": "shorter side resized to",
    "squash": "both sides resized to",
    "pad": "longer side resized to, and the shorter one padded with the mean color below to,",
}
CARD_METRICS = {"accuracy": "accuracy", "auroc": "roc_auc", "f1": "f1"}  # names of metrics on the Hub
UNSEEN = "Near copies (other compression, size or color) were not searched for here: `hf_histo audit` does."
HERE = "THIS_FOLDER"  # placeholder in the card's code, which `hub.push` replaces by the repository's name


def card(
    sidecar: Sidecar,
    metrics: Mapping[str, Any],
    *,
    figures: Mapping[str, Path] | None = None,
    cost: str = "",
    model_args: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The model card. Arguments are as for `folder.save`; `model_args` are those that timm builds the backbone with."""
    known = facts(sidecar, metrics, figures or {})
    name, dataset = sidecar.backbone.name, sidecar.data.name
    data = ModelCardData(
        library_name="peft" if sidecar.method != "full" else "transformers",
        pipeline_tag="image-classification",
        base_model=None if Path(name).is_absolute() or name == "builtin" else name,
        license=metrics["options"]["hub_license"],
        tags=["hf_histo", "medical", sidecar.trained],
        model_name=known["title"],
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
            **known,
        )
    )


def facts(sidecar: Sidecar, metrics: Mapping[str, Any], figures: Mapping[str, Path]) -> dict[str, Any]:
    """The values that the templates of card and report show, by name."""
    splits, names = sidecar.data.splits, sidecar.label_names
    hidden = any(held.hidden for held in splits.values())
    header = ["", "images", "groups", *sidecar.label_names, *(["hidden"] if hidden else []), "centers (images)"]
    rows = [
        [
            split,
            held.images,
            held.groups or None,
            *held.classes.values(),
            *([held.hidden] if hidden else []),
            ", ".join(f"{center} ({count:,})" for center, count in held.centers.items()) or None,
        ]
        for split, held in splits.items()
    ]
    return {
        "title": sidecar.title,
        "decision": "The most probable class is predicted."
        if sidecar.num_outputs > 1
        else f"{names[1]} is predicted if its probability is at least {sidecar.threshold}.",
        "backbone": sidecar.backbone.title,
        "sidecar": sidecar,
        "metrics": metrics,
        "figures": figures,
        "decisions": decisions.rows(metrics),
        "advice": decisions.advice(metrics),
        "options": metrics["options"],
        "changed": {
            name: value
            for name, value in metrics["options"].items()
            if name not in OPTIONS or value != OPTIONS[name].default
        },
        "data_rows": list(zip(header, *rows, strict=True)),
        "leaks": [*_leaks(splits), *([] if sidecar.data.near_copies_searched else [UNSEEN])],
    }


def _leaks(splits: Mapping[str, Composition]) -> Iterator[str]:
    """Sentences on images, groups and centers that other splits share with `train`."""
    seen = splits["train"].centers.keys()
    for split, held in splits.items():
        if split == "train":
            continue
        copies, groups = held.copies_of_train, held.groups_of_train
        if copies is None:
            yield f"{split}: not compared with the training images, which were streamed."
            continue
        yield (
            f"{split}: "
            + ", ".join(
                [
                    f"{copies:,} of {held.images:,} images are byte copies of images in train"
                    if copies
                    else "no image is a byte copy of one in train",
                    f"{groups:,} of {held.groups:,} groups are also in train"
                    if groups
                    else "no group is also in train"
                    if held.groups
                    else "groups are unknown",
                    f"centers that are not in train: {', '.join(sorted(held.centers.keys() - seen)) or 'none'}"
                    if held.centers
                    else "centers are unknown",
                ]
            )
            + "."
        )
