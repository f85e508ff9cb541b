"""A draft of the reporting checklists CLAIM and TRIPOD+AI, filled from what a run recorded.

Numbers and topics of the items are those of Tejani et al. 2024, "Checklist for Artificial Intelligence in Medical
Imaging (CLAIM): 2024 Update", Radiology: Artificial Intelligence, doi:10.1148/ryai.240300, all 44 items; and of Collins
et al. 2024, "TRIPOD+AI statement", BMJ 385:e078378, table 2, the items on the development of a model for which a run
records something. Topics are shortened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_histo.adapter import model_card
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import documents, report

BLANK = "To be filled in by the authors"


@dataclass(frozen=True)
class Item:
    """An item of a checklist.

    Attributes:
        number: its number in the checklist.
        topic: what it asks for, shortened.
        recorded: what the run recorded about it; "" without a record.
        missing: what the authors must add; "" if nothing.
    """

    number: str
    topic: str
    recorded: str = ""
    missing: str = ""

    @property
    def blank(self) -> str:
        """The mark for the authors; "" if nothing is missing."""
        if self.recorded and not self.missing:
            return ""
        return f"{BLANK}: {self.missing}." if self.missing else f"{BLANK}."


def text(
    sidecar: Sidecar, metrics: Mapping[str, Any], tables: Mapping[str, Predictions], figures: Mapping[str, Path]
) -> str:
    """The checklists as Markdown. Arguments are as for `folder.save`."""
    facts = model_card.facts(sidecar, metrics, figures)
    errors = report.error_tables(tables, sidecar.threshold)
    return documents.render("checklist.md", title=facts["title"], checklists=items(facts, errors))


def items(facts: Mapping[str, Any], errors: Mapping[str, list[list[object]]]) -> dict[str, list[Item]]:
    """Return the items of each checklist, by its name and source.

    Args:
        facts: see `model_card.facts`.
        errors: see `report.error_tables`.
    """
    sidecar, metrics, options = facts["sidecar"], facts["metrics"], facts["options"]
    splits, data, size = sidecar.data.splits, sidecar.data, sidecar.preprocessing
    counts = "; ".join(
        f"{split}: {held.images:,} images of {held.groups or 'unknown'} groups ({_counts(held.classes)})"
        for split, held in splits.items()
    )
    centers = "; ".join(
        f"{split}: " + ", ".join(f"center {center} ({count:,} images)" for center, count in held.centers.items())
        for split, held in splits.items()
        if held.centers
    )
    hidden = "; ".join(f"{split}: {held.hidden:,} images" for split, held in splits.items() if held.hidden)
    source = f"{data.name}, content fingerprint {data.fingerprint}" + (
        f"; {data.description}" if data.description else ""
    )
    model = (
        f"{sidecar.trained} adaptation of {facts['backbone']} (weights {sidecar.backbone.fingerprint}"
        + (f", revision {sidecar.backbone.revision}" if sidecar.backbone.revision else "")
        + f"); classifier: {sidecar.head}; {metrics['parameters']['trainable']:,} of "
        f"{metrics['parameters']['total']:,} parameters trained; input: RGB, {size.image_size} × {size.image_size} "
        f"pixels; output: {', '.join(sidecar.label_names)}"
    )
    prepared = ", ".join(sidecar.beside_the_model)
    preprocessing = (
        f"resized to {size.resize_size} ({size.fit}, {size.interpolation}), center crop {size.image_size}, minus "
        f"{size.mean}, divided by {size.std}" + (f"; {prepared}" if prepared else "")
    )
    training = _listed(
        options,
        "num_train_epochs max_steps per_device_train_batch_size optimizer learning_rate weight_decay lr_scheduler_type",
        "warmup_steps weight_averaging early_stopping_patience augmentation class_balance domain_loss seed",
    )
    training += "; all options are in metrics.json"
    selection = metrics["selection"]
    selected = f"by {selection['metric']} on {selection['split']}; no other split was used"
    uncertainty = "95% confidence intervals over groups, or over images where groups are unknown (Wilson, jackknife)"
    performance = "; ".join(
        f"{report.marked(split, values)}: " + ", ".join(f"{row} {cell}" for row, cell in _overall(values).items())
        for split, values in metrics["splits"].items()
        if values["overall"]["n"]
    )
    by_center = "in the table of each split, by center" if centers else ""
    failures = "; ".join(
        f"{split}: " + ", ".join(f"{name} {cell}" for name, cell in zip(rows[0][1:], rows[-1][1:], strict=True) if cell)
        for split, rows in errors.items()
    )
    output = "class probabilities. " + facts["decision"]
    if sidecar.thresholds:
        output += " Best balanced accuracy on val: " + _counts({k: round(v, 3) for k, v in sidecar.thresholds.items()})
    if sidecar.temperature != 1:
        output += f" Calibrated by a temperature of {sidecar.temperature:.3f}, fitted on val"
    measures = "accuracy, balanced accuracy, AUROC, F1, ECE, Brier score; ROC, confusion and reliability figures"
    unread = f"unreadable images: --on_bad_image {options['on_bad_image']}" if "on_bad_image" in options else ""
    missing = "; ".join(filter(None, [f"hidden labels, left out of metrics: {hidden}" if hidden else "", unread]))
    disjoint = " ".join(facts["leaks"])
    partition = counts + "; " + _listed(options, "split test_centers shots percentage")
    explained = "; ".join(caption for caption in facts["figures"] if caption.startswith("Where the model sees"))
    versions = ", ".join(f"{package} {version}" for package, version in sidecar.versions.items())
    start = f"backbone: {facts['backbone']}, weights {sidecar.backbone.fingerprint}; " + _listed(
        options, "init_adapter init_lora_weights text_prompt random_weights seed"
    )
    views = f"one model; test-time views: {sidecar.views.count}"
    pixels = "the images of a slide or group" if sidecar.head.is_of_bags else "one image"
    claim = [
        Item("1", "Title: the AI method"),
        Item("2", "Abstract: structured summary"),
        Item("3", "Background, intended use and role"),
        Item("4", "Aims, objectives, hypotheses"),
        Item("5", "Prospective or retrospective"),
        Item("6", "Study goal"),
        Item("7", "Data sources", source, "where and when the images were acquired"),
        Item("8", "Inclusion and exclusion criteria"),
        Item("9", "Preprocessing", preprocessing, "steps before the files that were read"),
        Item("10", "Selection of data subsets"),
        Item("11", "De-identification"),
        Item("12", "Missing data", missing, "data missing before the files that were read"),
        Item("13", "Image acquisition protocol"),
        Item("14", "Method for the reference standard"),
        Item("15", "Rationale for the reference standard"),
        Item("16", "Source of the reference annotations"),
        Item("17", "Annotation of the test set"),
        Item("18", "Variability between and within raters"),
        Item("19", "Assignment of data to partitions", partition, "how splits that came with the data were made"),
        Item("20", "Level at which partitions are disjoint", disjoint, "what a group is: patient, slide or other"),
        Item("21", "Intended sample size"),
        Item("22", "Model", model),
        Item("23", "Software", versions),
        Item("24", "Initialization of parameters", start, "what the backbone was pretrained on"),
        Item("25", "Training", training),
        Item("26", "Selection of the final model", selected, "how many runs it was chosen from"),
        Item("27", "Ensembling", views, "whether several models are combined"),
        Item("28", "Metrics of performance", measures, "their rationale"),
        Item("29", "Significance and uncertainty", uncertainty),
        Item("30", "Robustness or sensitivity analysis"),
        Item("31", "Explainability", explained, "how it was validated" if explained else ""),
        Item("32", "Evaluation on internal data", "", "which splits are internal"),
        Item("33", "Testing on external data", disjoint if centers else "", "which splits are external"),
        Item("34", "Registration of a clinical trial"),
        Item("35", "Patients or examinations included and excluded", counts, "patients, and what was excluded"),
        Item("36", "Characteristics of cases in each partition", centers, "demographic and clinical characteristics"),
        Item("37", "Performance with uncertainty", performance),
        Item("38", "Diagnostic performance and its precision", by_center, "what the clinical use needs"),
        Item("39", "Failure analysis", f"called another class: {failures}" if failures else "", "why"),
        Item("40", "Limitations"),
        Item("41", "Implications for practice"),
        Item("42", "Protocol or further technical details"),
        Item("43", "Availability of software, model and data", f"software: {versions}", "model and data"),
        Item("44", "Funding and its role"),
    ]
    tripod = [
        Item("5a", "Data: source", source, "why these data, and how representative they are"),
        Item("6a", "Participants: setting, centers", centers, "setting and places"),
        Item("7", "Data preparation", preprocessing, "quality checks, and whether the same for all groups of people"),
        Item("8a", "Outcome", f"classes: {', '.join(sidecar.label_names)}", "how and when it was assessed"),
        Item("9b", "Predictors", f"the pixels of {pixels}", "how images were acquired"),
        Item("10", "Sample size", counts, "how it was determined, and whether it suffices"),
        Item("11", "Missing data", missing, "data missing before the files that were read"),
        Item("12a", "Use and partition of the data", partition, "how splits that came with the data were made"),
        Item("12b", "Handling of predictors", preprocessing),
        Item("12c", "Model and its building", f"{model}; {training}; chosen {selected}", "tuning over several runs"),
        Item("12d", "Heterogeneity over clusters", by_center, "how it was handled"),
        Item("12e", "Measures of performance", measures, "their rationale"),
        Item("13", "Class imbalance", _listed(options, "class_balance"), "why" if "class_balance" in options else ""),
        Item("15", "Output and thresholds", output, "rationale"),
        Item("16", "Differences between development and evaluation data", disjoint, "setting, eligibility, outcome"),
        Item("21", "Participants and outcomes in each analysis", counts, "participants"),
        Item("22", "Full model", "the adapter folder, with its backbone", "where it is available, restrictions"),
        Item("23a", "Performance with intervals", performance, "by demographic groups"),
        Item("23b", "Heterogeneity over clusters, results", by_center),
    ]
    return {
        "CLAIM 2024 update (Tejani et al., Radiology: Artificial Intelligence 2024, doi:10.1148/ryai.240300)": claim,
        "TRIPOD+AI, items that a run informs (Collins et al., BMJ 2024, doi:10.1136/bmj-2023-078378)": tripod,
    }


def _counts(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _listed(options: Mapping[str, Any], *names: str) -> str:
    """The named options that were recorded with a value, as "name value, ..."."""
    wanted = " ".join(names).split()
    return ", ".join(f"{name} {options[name]}" for name in wanted if options.get(name) is not None)


def _overall(values: Mapping[str, Any]) -> dict[str, object]:
    """The metrics of a split overall, with intervals, by name; undefined ones are left out."""
    header, *rows = report.center_rows(values)
    return {str(name): cell for name, cell in zip(header[3:], rows[-1][3:], strict=True) if cell is not None}
