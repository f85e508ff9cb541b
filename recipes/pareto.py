"""Can the same accuracy be had with fewer parameters? A sweep over the rank of LoRA and the layers that it adapts.

    accelerate launch recipes/pareto.py --config recipes/configs/digits_mobilenetv2_case3.yaml --data DIR \\
        --ranks 1 4 16 --layers all-conv pointwise last-conv --output_dir OUT

Takes every option of recipes/histo_lora.py, and the same data. `--layers` are presets or regexes, as for
`--target_modules`; `--lora_alpha` grows with the rank, so that their ratio stays what it is. Besides each combination,
the classifier is trained alone. Each combination and seed is a run of its own in OUT/LAYERS-rank-R/seed-S, so the same
command resumes where an earlier one was stopped; --workers and --cluster share the runs. Into OUT go pareto.md, .json
and .png: accuracy against trainable parameters, and the runs that no other one beats in both. The front is drawn on
val; one on test (`--front_split test`) shows what was reached, and must not choose.
"""

from hf_histo.config import parse_with
from hf_histo.config.experiments import ParetoOptions
from hf_histo.launch import run


def main() -> None:
    config, options = parse_with(ParetoOptions, __doc__)
    from hf_histo.experiments.pareto import pareto

    pareto(config, options)


if __name__ == "__main__":
    run(main)
