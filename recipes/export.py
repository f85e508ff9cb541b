"""Write a trained classifier for use without this package: one whole checkpoint, or ONNX.

    python recipes/export.py --adapter runs/NAME/adapter --format merged --output_dir OUT
    python recipes/export.py --adapter runs/NAME/adapter --format onnx --output_dir OUT

`merged` adds LoRA into the backbone's weights: `AutoModelForImageClassification.from_pretrained(OUT)`, or
`timm.create_model("local-dir:OUT")` for a backbone of timm. `onnx` needs `pip install hf_histo[onnx]`, and is written
only if ONNX Runtime gives PyTorch's logits. `OUT/export.json` states preprocessing, labels, thresholds and temperature,
and what the exported model leaves out: normalization of color, and the mean over several views.
"""

import logging
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from hf_histo.export import FORMATS, export
from hf_histo.files import require_output
from hf_histo.hub import load
from hf_histo.launch import run


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder, or its name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of an adapter on the Hub")
    parser.add_argument("--backbone", help="the base model, where it is no longer where the adapter was trained")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write, which must not exist")
    options = parser.parse_args()

    require_output(options.output_dir, [options.adapter, options.backbone], folder=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    model, sidecar = load(options.adapter, revision=options.revision, backbone=options.backbone)
    export(model, sidecar, options.output_dir, options.format)
    print(f"{options.format}: {options.output_dir}")


if __name__ == "__main__":
    run(main)
