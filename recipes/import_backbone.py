"""Fetch a registered foundation model, and write it as a folder of safetensors for `--backbone`.

    python recipes/import_backbone.py --list
    hf auth login                                # a gated model: accept its terms on its page on the Hub before
    python recipes/import_backbone.py --backbone uni --output_dir backbones/uni
    python recipes/cytology_lora.py --backbone backbones/uni --data DIR

This package unpickles nothing. Some models are published as a pickle only: then the recipe prints where it lies and how
to convert it, if you trust its source, and `--snapshot` reads the result.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import ImportBackboneOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(ImportBackboneOptions, __doc__)
    from hf_histo.models.conversion import import_backbone

    print(import_backbone(options))


if __name__ == "__main__":
    run(main)
