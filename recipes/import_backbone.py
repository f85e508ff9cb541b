"""Fetch a registered foundation model, and write it as a folder of safetensors for `--backbone`.

    python recipes/import_backbone.py --list
    hf auth login                                # a gated model: accept its terms on its page on the Hub before
    python recipes/import_backbone.py --backbone uni --output_dir backbones/uni
    python recipes/cytology_lora.py --backbone backbones/uni --data DIR

This package unpickles nothing. Some models are published as a pickle only: then the recipe prints where it lies and how
to convert it, if you trust its source, and `--snapshot` reads the result.
"""

from hf_histo.launch import run
from hf_histo.models import conversion


def main() -> None:
    conversion.main(__doc__)


if __name__ == "__main__":
    run(main)
