"""Write synthetic pyramidal slides with annotations, to try everything that reads slides.

    python recipes/make_slides.py --output_dir slides
    accelerate launch recipes/histo_lora.py --data slides/slides.csv --patch_size 96

Slides of the five centers of the built-in tissue, half of them with a tumor; `slides.csv` lists them with label,
patient, center and split, and a GeoJSON file as QuPath exports it lies beside each slide with a tumor.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import MakeSlidesOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(MakeSlidesOptions, __doc__)
    from hf_histo.data.synthetic.slides import generate

    generate(
        options.output_dir,
        seed=options.seed,
        slides_per_center=options.slides_per_center,
        cells=options.cells,
        kind=options.kind,
        tumor_patches=options.tumor_patches,
    )


if __name__ == "__main__":
    run(main)
