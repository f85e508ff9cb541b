"""Fine-tune a foundation model on cytology images, with all labels or a handful.

    accelerate launch recipes/cytology_lora.py --config recipes/configs/cytology_lora.yaml --data DIR --shots 16
    accelerate launch recipes/cytology_lora.py --data DIR --config recipes/configs/cytology_mobilenetv2.yaml

DIR holds SIPaKMeD, MLCC, BCFC, Herlev or HiCervix: as class folders, as images/{train,val,test}/CLASS_NUMBER.EXT, as
images/CLASS/ with splits/*.txt, or with HiCervix's tables. Splits that are missing are cut, always the same way: a
fifth of images without any for test, a tenth of train for val. The same seed trains on the same images, whatever the
method. recipes/few_shot.py runs a grid.
"""

from hf_histo.config import parse
from hf_histo.launch import importing, run, show


def main() -> None:
    config = parse(__doc__)
    show(config.title())
    with importing():
        from hf_histo.data.protocol import prepare
        from hf_histo.finetune import run_config

    data = prepare(config)
    show(run_config(config, data).summary())


if __name__ == "__main__":
    run(main)
