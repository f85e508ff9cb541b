"""Fine-tune a vision backbone on brain MRI slices in one folder per class, and report what the copies among them do.

    accelerate launch recipes/mri_lora.py --config recipes/configs/mri_vgg16_lora.yaml --data DIR
    accelerate launch recipes/mri_lora.py --data DIR --backbone NAME_OR_FOLDER --split clean --negative_class no_tumor

DIR holds Training/ and Testing/, or train/, val/ and test/, with a folder of images for each class; or it is a table of
image files with a column split. Before training, images are compared with each other, and copies between and within
splits are reported. `--split published` (the default here) keeps the splits, cuts val from train by families of copies
where there is none, and gives every result twice: on test, and on test_clean, the images of test without a copy in
training. `--split clean` keeps one image of each family and splits anew. The checkpoint is chosen on val; test is only
predicted. The result is an adapter folder for recipes/predict.py and hf_histo.inference.Classifier.
"""

from hf_histo.config import parse
from hf_histo.launch import importing, run, show


def main() -> None:
    config = parse(__doc__, split="published")
    show(config.title())
    with importing():
        from hf_histo.data.protocol import prepare
        from hf_histo.finetune import run_config

    data = prepare(config)
    show(f"{config.data.data}: {data['train'].info.description}")
    show(run_config(config, data).summary())


if __name__ == "__main__":
    run(main)
