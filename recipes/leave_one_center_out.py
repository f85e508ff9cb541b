"""Train with each acquisition center held out in turn, and say how good the result is on the one never seen.

    accelerate launch recipes/leave_one_center_out.py --config recipes/configs/histo_resnet50_lora.yaml --data DIR \\
        --seeds 2 --output_dir OUT

Takes every option of recipes/histo_lora.py, and the same data, whose train and val are put together and split anew: one
center is `test`, the others give `train` and `val`. Each held-out center and seed is a run of its own, in
OUT/center-C-seed-S, so the same command goes on where an earlier one was stopped. Into OUT goes
leave_one_center_out.json.
"""

from dataclasses import asdict, dataclass
from typing import Any

from hf_histo import launch
from hf_histo.config import option, parse_with
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import prepare, refuse
from hf_histo.data.splits.folds import leave_one_center_out
from hf_histo.errors import HistoError
from hf_histo.evaluation.reporting.report import table
from hf_histo.evaluation.reporting.summary import METRICS, held_out
from hf_histo.files import write_json
from hf_histo.finetune import fine_tune
from hf_histo.launch import run


@dataclass
class Options:
    _argument_group_name = "leave one center out"

    seeds: int = option(2, "number of seeds for each center, counted up from --seed")


def main() -> None:
    config, options = parse_with(Options, __doc__)
    folder = config.parent_folder()
    if options.seeds < 1:
        raise HistoError(f"--seeds is {options.seeds}, expected at least 1")

    refuse(config, {"pool_centers": "a center is held out of training"})
    data = prepare(config)
    runs: dict[str, Any] = {}
    values: dict[str, dict[int, dict[int, float | None]]] = {metric: {} for metric in METRICS}
    for seed in range(config.training.seed, config.training.seed + options.seeds):
        for center, fold in leave_one_center_out(data, seed=seed).items():
            name = f"center-{center}-seed-{seed}"
            overall = fine_tune(config.at(folder / name, seed), fold).metrics["splits"]["test"]["overall"]
            for metric, by_center in values.items():
                by_center.setdefault(center, {})[seed] = overall[metric]["value"]
            runs[name] = {metric: overall[metric]["value"] for metric in METRICS}
            if launch.is_main_process():
                print(f"{name}: accuracy {overall['accuracy']['value']:.3f} on {overall['n']} images", flush=True)

    if not launch.is_main_process():
        return
    summaries = {metric: held_out(by_center) for metric, by_center in values.items()}
    centers = next(iter(values.values()))
    lines = {f"center {center}": [summary.centers[center] for summary in summaries.values()] for center in centers}
    lines["mean over centers"] = [summary.mean for summary in summaries.values()]
    lines["worst center"] = [summary.worst for summary in summaries.values()]
    print(f"\nHeld-out centers of {config.data.data}: mean ± sample deviation (seeds: {options.seeds})\n")
    print(table([["held out", *METRICS.values()], *([name, *spreads] for name, spreads in lines.items())]))
    write_json(
        folder / "leave_one_center_out.json",
        {
            "data": {"name": config.data.data, "fingerprint": fingerprint(data)},
            "options": config.flat(),
            "seeds": options.seeds,
            "metrics": {metric: asdict(summary) for metric, summary in summaries.items()},
            "runs": runs,
        },
    )
    print(f"\nwrote {folder / 'leave_one_center_out.json'}")


if __name__ == "__main__":
    run(main)
