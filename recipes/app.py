"""A page in the browser: drop an image, see class probabilities, where the model looks, and whether the color is known.

    python recipes/app.py --adapter runs/NAME/adapter
    python recipes/app.py --adapter runs/NAME/adapter --space_dir SPACE && hf upload USER/NAME SPACE --repo-type space

Needs `pip install 'hf_histo[app]'`. Probabilities are calibrated by the adapter's temperature. The color warning
compares the image's channel statistics with those of the training images: see `hf_histo.transforms.color_shift`. A
file may have 64 MiB, and its image 16 megapixels. `--space_dir` writes a folder that runs as a Space of the Hub instead
of starting the page: the page, the adapter and the package itself.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import AppOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(AppOptions, __doc__)
    from hf_histo import app

    app.run(options)


if __name__ == "__main__":
    run(main)
