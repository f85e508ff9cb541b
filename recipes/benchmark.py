"""How fast is this package on this machine: beside other practice, beside the limit, and without each of its pieces?

    python recipes/benchmark.py --backbone resnet50.a1_in1k --random_weights --image_size 224 \\
        --per_device_train_batch_size 16 --mixed_precision bf16 --output_dir OUT
    python recipes/benchmark.py --backbones A B --parts training prediction --output_dir OUT
    python recipes/benchmark.py --quick --output_dir OUT         # the built-in backbone; to see that it runs

Takes the options of a run: of the backbone, the adapter, the augmentation, the batch, the precision. Stock is the
guide to image classification in PEFT's documentation: torchvision's transforms on PIL images in `set_transform`,
`LoraConfig`, `Trainer`, with the same layers, rank and augmentation, in float32 and in the precision of the others.
The tuned peer is what a careful user makes of it: that precision, channels-last, frozen batch norm, and torchvision's
transforms on uint8 tensors. The floor of a step is a forward pass and the gradient down to the output of the first
adapted layer. Prediction is measured in float32, with bf16 in that, too, beside models that are fed from memory, also
in ONNX Runtime and OpenVINO where they are installed. Images are generated. The sides are timed in turn, and the median
over the repetitions counts: on a busy machine, ratios are worth more than seconds. All parts of a large backbone take
long: --parts chooses some. Into OUT go benchmark.md, .json and .png.
"""

from hf_histo.config import parse_with
from hf_histo.config.experiments import BenchmarkOptions
from hf_histo.launch import run


def main() -> None:
    config, options = parse_with(BenchmarkOptions, __doc__)
    from hf_histo.experiments.benchmark.measure import benchmark

    benchmark(config, options)


if __name__ == "__main__":
    run(main)
