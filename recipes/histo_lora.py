"""Fine-tune a vision backbone on histology patches from several acquisition centers.

    accelerate launch recipes/histo_lora.py                                   # built-in data set and backbone
    accelerate launch recipes/histo_lora.py --data DIR --backbone NAME_OR_FOLDER
    accelerate launch recipes/histo_lora.py --config recipes/configs/histo_resnet50_lora.yaml --data DIR

Without `--config`, color normalization, mixing of the centers' colors and eight views are on where the training images
are of several centers. DIR holds train.h5, val.h5 (and test.h5), PatchCamelyon's files, or WILDS Camelyon17; or it is a
table of image files, with `--test_centers NAME` to hold centers out. The checkpoint is chosen on val; test is only
predicted. The result is an adapter folder for recipes/predict.py and hf_histo.inference.Classifier.
"""

from hf_histo.config import parse_fine_tuning
from hf_histo.launch import importing, run, show


def main() -> None:
    config = parse_fine_tuning(__doc__)
    show(config.title())
    with importing():
        from hf_histo.data.protocol import prepare
        from hf_histo.finetune import run_config

    data = prepare(config)
    show(f"{config.data.data}: {next(iter(data.values())).info.description}")
    show(run_config(config, data).summary())


if __name__ == "__main__":
    run(main)
