"""The command that makes an ensemble folder of finished runs."""

from __future__ import annotations

from hf_histo import hub
from hf_histo.adapter import ensemble
from hf_histo.config.commands import EnsembleOptions
from hf_histo.evaluation.metrics import classification
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting.report import overall_table
from hf_histo.files import require_new, require_output
from hf_histo.training.run_folder import PREDICTIONS


def make_ensemble(options: EnsembleOptions) -> str:
    """Write the folder; return a table of each split: members and ensemble, with 95% intervals.

    Raises `HistoError` for an output that exists or lies in a member, and as `ensemble.save` does.
    """
    require_output(options.output_dir, options.adapters, folder=True)
    require_new("--output_dir", options.output_dir)
    members = [hub.fetch(adapter) for adapter in options.adapters]
    metrics = ensemble.save(options.output_dir, members)
    parts = []
    for split, found in metrics["splits"].items():
        if not found["overall"]["n"]:
            continue
        reports = {
            adapter: classification.report(Predictions.read(member / PREDICTIONS / f"{split}.parquet"))
            for adapter, member in zip(options.adapters, members, strict=True)
        }
        parts.append(f"{split}:\n{overall_table({**reports, 'ensemble': found})}")
    return "\n\n".join([*parts, f"ensemble folder: {options.output_dir}"])
