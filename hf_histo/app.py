"""The demo page of `recipes/app.py`: its predictions and explanations, and a Space on the Hub that runs it."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional

import hf_histo
from hf_histo import hub
from hf_histo.adapter import ensemble
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config.commands import AppOptions
from hf_histo.data.schema import decode
from hf_histo.errors import HistoError, idle_option
from hf_histo.evaluation.figures.explanation import blend
from hf_histo.evaluation.reporting.documents import plain
from hf_histo.files import atomic_folder, require_new, require_output
from hf_histo.inference import Classifier

MAX_BYTES = 64 * 2**20  # largest uploaded file
MAX_PIXELS = 16_000_000  # largest image, in pixels, so that a prediction takes less than 2 GiB
SHOWN = 1024  # longest side, in pixels, of the images that the page shows
# app.py of a Space.
SPACE_APP = '''"""A page for the adapter in this folder."""

import sys
from pathlib import Path

from hf_histo import app
from hf_histo.config import parse_command
from hf_histo.config.commands import AppOptions
from hf_histo.launch import run


def main() -> None:
    beside = ["--adapter", str(Path(__file__).parent / "adapter")]
    app.run(parse_command(AppOptions, __doc__, [*beside, *sys.argv[1:]]))


if __name__ == "__main__":
    run(main)
'''
STYLE = """
.gradio-container {max-width: 1080px !important; margin: auto}
.image-frame img, .image-container img {width: 100%; height: 100%; object-fit: contain}
"""


def run(options: AppOptions) -> None:
    """Show the page, or write a Space. Raises HistoError without gradio, and as `hub.fetch` and `write_space` do."""
    folder = hub.fetch(options.adapter, options.revision)
    if not ensemble.is_ensemble(folder):
        Sidecar.read(folder).require_images(f"--adapter {options.adapter}", "use hf_histo predict")
    if options.space_dir:
        if options.backbone is not None:
            raise idle_option("backbone", options.backbone, "a Space loads the one that the adapter names")
        return write_space(options.space_dir, folder)
    gradio = _gradio()
    classifier = Classifier.from_pretrained(folder, backbone=options.backbone)
    page(gradio, classifier, card_of(folder)).launch(server_port=options.port, css=STYLE, max_file_size=MAX_BYTES)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError:
        raise HistoError("the page needs gradio: pip install 'hf_histo[app]'") from None
    return gradio


def card_of(folder: Path) -> str:
    """The model card without its metadata and its figures, which the page does not serve.

    Other images and HTML are shown as text, so that the page does not load URLs from a card.
    """
    text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)[-1]
    text = re.sub(r"^!\[.*\]\(figures/.*\)$", "", text, flags=re.MULTILINE)
    return re.sub(r"<(?!/?(details|summary)>)", "&lt;", text.replace("![", "!\\["))


def answer(
    classifier: Classifier, data: bytes | None
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None, dict[str, float] | None, str]:
    """Predict the content `data` of an image file: the image, its heat map, probabilities by class, a note in Markdown.

    The file is decoded only by this package. Both images are uint8 (H, W, 3), with sides of at most `SHOWN` pixels. For
    a file that can't be read or has more than `MAX_PIXELS`, all but the note are None.
    """
    if data is None:
        return None, None, None, ""
    sidecar = classifier.sidecar
    names = sidecar.label_names
    try:
        image = decode(data, "the file", sidecar.preprocessing.reading, max_pixels=MAX_PIXELS)
        table = classifier(image)
        chosen = str(table["predicted"][0])
        heat = torch.from_numpy(classifier.explain(image, [names.index(chosen)])[0])
    except HistoError as error:
        return None, None, None, f"**No answer.** {plain(error)}"
    probabilities = table.by_class("calibrated")[0]
    decision = f"**{plain(chosen)}**"
    if sidecar.num_outputs == 1:
        decision += f" at a threshold of {sidecar.threshold:.2f} on the probability of {plain(names[1])}"
    shown = small(image).permute(1, 2, 0).numpy()
    return (
        shown,
        blend(shown, small(heat[None])[0].numpy()),
        dict(zip(names, probabilities.tolist(), strict=True)),
        f"{decision}\n\n{color_warning(classifier, image)}",
    )


def small(image: torch.Tensor) -> torch.Tensor:
    """Downscale an image (C, H, W) so that its longer side is at most `SHOWN` pixels."""
    height, width = image.shape[-2:]
    scale = min(1, SHOWN / max(height, width))
    size = [max(1, round(side * scale)) for side in (height, width)]
    shown: torch.Tensor = functional.resize(image, size, antialias=True)
    return shown


def page(gradio: Any, classifier: Classifier, card: str) -> Any:
    """Create the page (`gradio.Blocks`), not yet started. Uploads are deleted within two hours."""
    names = classifier.sidecar.label_names
    with gradio.Blocks(title=" / ".join(names), delete_cache=(3600, 3600)) as blocks:
        gradio.Markdown(
            f"# {plain(' / '.join(names))}\nDrop an image of at most {MAX_PIXELS // 10**6} megapixels and "
            f"{MAX_BYTES // 2**20} MiB. For research; not a medical device."
        )
        with gradio.Row():
            with gradio.Column():
                # Not gradio.Image, which opens all formats of PIL, some of them with other programs.
                file = gradio.File(label="Image file", type="binary")
                image = gradio.Image(label="Image", interactive=False, height=360)
            with gradio.Column():
                probabilities = gradio.Label(label="Calibrated probability")
                remark = gradio.Markdown(elem_id="remark")
                heat = gradio.Image(label="Evidence for the predicted class", interactive=False, height=360)
        with gradio.Accordion("Model card", open=False):
            gradio.Markdown(card)
        # One prediction at a time, to bound the memory.
        shown = [image, heat, probabilities, remark]
        file.change(partial(answer, classifier), file, shown, concurrency_limit=1, api_name="answer")
    return blocks


def color_warning(classifier: Classifier, image: torch.Tensor) -> str:
    """A line of Markdown on how far the color of an image, uint8 (3, H, W), is from that of the training centers."""
    colors = classifier.sidecar.colors
    if colors is None:
        return "The adapter has no color statistics of its training images: the color is not checked."
    distance = colors.distance(image)
    measured = f"(distance {distance:.1f}; 99% of the training images are within {colors.limit:.1f})"
    if distance > colors.limit:
        return (
            f"\u26a0\ufe0f **The color is unlike that of the training centers** {measured}. The answer may be "
            "wrong: look at the scanner, the stain and the white balance."
        )
    return f"The color is like that of the training centers {measured}."


def write_space(target: Path, adapter: Path) -> None:
    """Write a folder that runs as a Space: app.py, the adapter, this package, its requirements, and a README.

    Raises HistoError if `target` exists, or the backbone is a local folder.
    """
    require_output(target, [adapter], folder=True)
    members = (
        [adapter / name for name in ensemble.read(adapter).members] if ensemble.is_ensemble(adapter) else [adapter]
    )
    sidecars = [Sidecar.read(folder) for folder in members]
    for sidecar in sidecars:
        if Path(sidecar.backbone.name).is_absolute() and sidecar.method != "full":
            raise HistoError(
                f"--space_dir {target}: the backbone is the local folder {sidecar.backbone.name}, which a Space does "
                "not have; expected 'builtin' or a name on the Hub: hf_histo push --hub_base_model gives one, then "
                "give what was pushed as --adapter"
            )
    require_new("--space_dir", target)
    gradio = _gradio()
    title = " or ".join(sidecars[0].label_names)
    settings = {"title": title, "sdk": "gradio", "sdk_version": gradio.__version__}
    settings |= {"python_version": "{}.{}".format(*sys.version_info), "app_file": "app.py"}
    needs = [
        text
        for text in importlib.metadata.requires("hf_histo") or []
        if "extra ==" not in text or "extra == 'app'" in text or 'extra == "app"' in text
    ]
    with atomic_folder(target) as folder:
        for name, content in hub.in_public(adapter, "adapter").items():
            file = folder / "adapter" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        shutil.copytree(
            Path(hf_histo.__file__).parent, folder / "hf_histo", ignore=shutil.ignore_patterns("__pycache__")
        )
        (folder / "app.py").write_text(SPACE_APP, encoding="utf-8")
        (folder / "requirements.txt").write_text("\n".join(text.split(";")[0].strip() for text in needs) + "\n")
        (folder / "README.md").write_text(
            f"---\n{yaml.safe_dump(settings, sort_keys=False)}---\n\n# {title}\n\n"
            "A page for an adapter of hf_histo, in `adapter/`. For research; not a medical device.\n"
        )
    print(f"Space: {target}")
