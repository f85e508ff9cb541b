"""Write a trained classifier for use without this package: one whole checkpoint, ONNX, or a model folder of WSInfer.

    python recipes/export.py --adapter runs/NAME/adapter --format merged --output_dir OUT
    python recipes/export.py --adapter runs/NAME/adapter --format onnx --output_dir OUT
    python recipes/export.py --adapter runs/SLIDES/adapter --format wsinfer --output_dir OUT

`merged` adds LoRA into the backbone's weights: `AutoModelForImageClassification.from_pretrained(OUT)`, or
`timm.create_model("local-dir:OUT")` for a backbone of timm. `onnx` needs `pip install 'hf_histo[onnx]'`, and is written
only if ONNX Runtime gives PyTorch's logits. `wsinfer` writes the TorchScript and `config.json` of an adapter that was
trained on slides, for WSInfer and its extension of QuPath. `OUT/export.json` states preprocessing, labels, thresholds
and temperature, and what the exported model leaves out: normalization of color, and the mean over several views.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import ExportOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(ExportOptions, __doc__)
    from hf_histo.export import export
    from hf_histo.files import require_output
    from hf_histo.hub import load

    require_output(options.output_dir, [options.adapter, options.backbone], folder=True)
    model, sidecar = load(options.adapter, revision=options.revision, backbone=options.backbone)
    export(model, sidecar, options.output_dir, options.format)
    print(f"{options.format}: {options.output_dir}")


if __name__ == "__main__":
    run(main)
