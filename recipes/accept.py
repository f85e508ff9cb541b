"""Is a model fit for use at a new site? Accept, recalibrate or refuse, from some of its images.

    python recipes/accept.py --adapter runs/NAME/adapter --data NEW --output_dir OUT
    python recipes/accept.py --adapter runs/NAME/adapter --data NEW --labels FEW --output_dir OUT

`--data` has 10 to 500 random images of the site, at best with a column of slides or patients; labels are not needed.
Tested are their colors, against those of training, and what the model gives for them, against what it gave for `val`;
predicted is the accuracy there. At a site like `val`, the verdict is "accept" with a probability of about 95% or more.
`--labels` has a few labeled images, which decide where they suffice: label more, and ask again, as often as you like.
`--reference` has images like those of `val`; then features are compared instead of log odds. Into the output folder go
`acceptance.html`, a page with the verdict and the reasons, and `acceptance.json`.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import AcceptOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(AcceptOptions, __doc__)
    from hf_histo.experiments.accept import accept

    print(accept(options))


if __name__ == "__main__":
    run(main)
