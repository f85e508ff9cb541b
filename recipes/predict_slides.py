"""Predict whole slides with a trained adapter: tiles and regions for QuPath, heat maps, and scores of each slide.

    python recipes/predict_slides.py A1.svs B1.ndpi --adapter runs/NAME/adapter --output_dir OUT
    accelerate launch recipes/predict_slides.py slides.csv --adapter runs/NAME/adapter --output_dir OUT

`hf_histo predict SLIDE ...` is the same. A slide is a file, or the folder of a DICOM slide; a table (.csv, .tsv,
.parquet, .xlsx) with a column `slide` names several. Tiles have the resolution and size of the training patches.

Each slide gets a folder with `tiles.csv`, `tiles.geojson` (or `regions.geojson`), `heat_map.png` and `record.json`, and
each a row in `slides.csv`. The processes of a launch, and several commands with one output folder, share the slides.
The same command continues after it was killed, and predicts again what failed. A slide that can't be predicted is
reported at the end, with exit code 1; the others are predicted all the same.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import PredictSlidesOptions
from hf_histo.launch import importing, run, show


def main() -> None:
    options = parse_command(PredictSlidesOptions, __doc__, first="slides")
    with importing():
        from hf_histo.experiments.predict_slides import predict_slides

    show(predict_slides(options))


if __name__ == "__main__":
    run(main)
