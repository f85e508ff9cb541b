"""Fine-tune a vision backbone on handwritten digits: LoRA, classifiers of several layers, and what an adapter weighs.

    accelerate launch recipes/digits_lora.py --config recipes/configs/digits_case1.yaml --data DIR       # to case4
    accelerate launch recipes/digits_lora.py --config recipes/configs/digits_mobilenetv2_case2.yaml --data DIR
    accelerate launch recipes/digits_lora.py --data hub:ylecun/mnist --head mlp --head_widths 128

DIR holds the idx files of MNIST or of a data set like it (train-images-idx3-ubyte.gz and so on), of whose training
images a tenth becomes val; hub:OWNER/NAME is a data set on the Hub. The checkpoint is chosen on val; test is only
predicted. The result is an adapter folder for recipes/predict.py and hf_histo.inference.Classifier.
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
