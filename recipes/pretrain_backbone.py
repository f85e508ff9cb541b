"""Pretrain the packaged backbone on procedural patterns: no photograph, no tissue, no download.

    python recipes/pretrain_backbone.py --output_dir backbone

A ResNet-10-T of timm with a quarter of the channels learns which of 48 random processes drew a pattern (see
`synthetic.patterns`), under colors drawn anew for every batch. The folder, 2.5 MB in fp16, loads wherever a Hub
name does: `AutoModelForImageClassification.from_pretrained("backbone", num_labels=1, ignore_mismatched_sizes=True)`.

The packaged one was made by this command; it takes about three minutes on two free CPU cores. A quick try:

    python recipes/pretrain_backbone.py --output_dir /tmp/backbone --steps 10 --images 480
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import PretrainBackboneOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(PretrainBackboneOptions, __doc__)
    from hf_histo.training.pretraining import pretrain

    pretrain(options)


if __name__ == "__main__":
    run(main)
