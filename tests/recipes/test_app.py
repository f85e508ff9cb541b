"""The page in a browser: load, upload, read the answer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from miniature import write_adapter

from hf_histo import app
from hf_histo.config.commands import AppOptions
from hf_histo.errors import HistoError
from hf_histo.inference import Classifier
from hf_histo.transforms.color_shift import ColorRange

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "app.py"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium", "captum") if importlib.util.find_spec(name) is None]
MISSING += [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if path is None]
browsing = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


COLORS = ColorRange({"0": ([0.7, 0.5, 0.7, 0.2, 0.2, 0.2], [0.05] * 6)}, limit=2.0)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    return write_adapter(tmp_path_factory.mktemp("app") / "adapter", backbone, colors=COLORS, temperature=2.0)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    adapter = write_adapter(folder / "adapter", Path("builtin"), colors=COLORS, temperature=2.0)
    command = [sys.executable, str(RECIPE), "--adapter", str(adapter), "--space_dir", str(folder / "space")]
    subprocess.run(command, capture_output=True, text=True, check=True)
    return folder / "space"


def picture(path: Path, color: tuple[float, float, float]) -> Path:
    noise = np.random.default_rng(0).normal(0, 0.2, (120, 96, 3))
    pixels = np.clip(np.array(color) + noise, 0, 1) * 255
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def ghostscript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH whose `gs`, which PIL would start for an EPS, leaves a file `started` there."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {folder}/started\nexit 1\n")
    (folder / "gs").chmod(0o755)
    return folder


@pytest.fixture(scope="module", params=["adapter", "space"])
def page(request: pytest.FixtureRequest, ghostscript: Path) -> Iterator[tuple[str, Path]]:
    """URL and adapter of a page: one by the recipe, and one by a Space that it wrote, without this package."""
    folder: Path = request.getfixturevalue(request.param)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "PATH": f"{ghostscript}:{os.environ['PATH']}"}
    if request.param == "space":
        environment.pop("PYTHONPATH", None)
        command, shown = [sys.executable, "app.py"], folder / "adapter"
    else:
        command, shown = [sys.executable, str(RECIPE), "--adapter", str(folder)], folder
    page = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert page.poll() is None, page.communicate()[0]
            try:
                urllib.request.urlopen(found, timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("the page did not start")
        yield found, shown
    finally:
        page.terminate()
        page.wait()


@browsing
def test_an_image_is_dropped_and_answered(page: tuple[str, Path], tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1180,1000"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        address, adapter = page
        browser.get(address)
        wait = WebDriverWait(browser, 120)

        def answered(color: tuple[float, float, float], expected: str) -> str:
            """The text of the page once `expected` is in it."""
            for clear in browser.find_elements(
                By.CSS_SELECTOR, "button[aria-label^='Remove'], button[aria-label='Clear']"
            ):
                clear.click()
            field = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0]
            field.send_keys(str(picture(tmp_path / "patch.png", color)))
            wait.until(lambda b: expected in b.find_element(By.TAG_NAME, "body").text)
            wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "img[src*='gradio_api/file']")) >= 2)
            return str(browser.find_element(By.TAG_NAME, "body").text)

        answer = answered((0.7, 0.5, 0.7), "like that of the training centers")
        browser.save_screenshot(os.environ.get("HF_HISTO_SCREENSHOT") or str(tmp_path / "page.png"))
        table = Classifier.from_pretrained(adapter)(tmp_path / "patch.png")
        for probability in (table["calibrated"][0], 1 - table["calibrated"][0]):
            assert f"{100 * probability:.0f}%" in answer
        assert table["predicted"][0] in answer
        assert "unlike" not in answer
        answer = answered((0.2, 0.8, 0.2), "unlike that of the training centers")
        assert "distance" in answer
        browser.find_element(By.XPATH, "//*[text()='Model card']").click()
        wait.until(lambda b: "validated for diagnosis" in b.find_element(By.TAG_NAME, "body").text)
    finally:
        browser.quit()


@pytest.mark.skipif("gradio" in MISSING or "captum" in MISSING, reason="gradio or captum is not installed")
def test_an_upload_is_read_by_our_decoder_alone(page: tuple[str, Path], ghostscript: Path, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    address, adapter = page
    client = Client(address, verbose=False)
    path = picture(tmp_path / "patch.png", (0.7, 0.5, 0.7))
    image, heat, probabilities, remark = client.predict(handle_file(path), api_name="/answer")
    assert image and heat
    table = Classifier.from_pretrained(adapter)(path)
    assert f"**{table['predicted'][0]}**" in remark
    found = {entry["label"]: entry["confidence"] for entry in probabilities["confidences"]}
    assert found["tumor"] == pytest.approx(table["calibrated"][0], abs=1e-5)

    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "scan.png").write_bytes(eps)
    image, heat, probabilities, remark = client.predict(handle_file(tmp_path / "scan.png"), api_name="/answer")
    assert "not a readable image" in remark
    assert not any((image, heat, (probabilities or {}).get("confidences")))
    assert not (ghostscript / "started").exists()

    (tmp_path / "large.png").write_bytes(bytes(64 * 2**20 + 1))
    with pytest.raises(Exception, match=r"(?i)size|413"):
        client.predict(handle_file(tmp_path / "large.png"), api_name="/answer")


@pytest.mark.slow
@pytest.mark.skipif("captum" in MISSING, reason="captum is not installed")
def test_an_answer_takes_bounded_memory(adapter: Path, tmp_path: Path) -> None:
    """The largest allowed image takes less than 2 GiB, and a larger one is refused by its header."""
    for name, side in (("large", 4000), ("larger", 10_000)):
        PIL.Image.new("1", (side, side)).save(tmp_path / f"{name}.png")
    code = (
        "import resource, sys; from hf_histo.app import answer; from hf_histo.inference import Classifier\n"
        "adapter, large, larger = sys.argv[1:]\n"
        "classifier = Classifier.from_pretrained(adapter)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "print(answer(classifier, open(larger, 'rb').read())[3])\n"
        "print(peak() - before)\n"
        "image, heat, _, remark = answer(classifier, open(large, 'rb').read())\n"
        "print(image.shape == heat.shape == (1024, 1024, 3), 'training centers' in remark)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", code, str(adapter)]
    command += [str(tmp_path / f"{name}.png") for name in ("large", "larger")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    refusal, first, shown, second = done.stdout.splitlines()
    assert "expected at most 16,000,000" in refusal
    assert int(first) < 2**15  # KiB
    assert shown == "True True"
    assert int(second) < 2**21


@pytest.mark.skipif("captum" in MISSING, reason="captum is not installed")
def test_no_text_of_an_adapter_is_markdown(tmp_path: Path, backbone: Path) -> None:
    """Class names and the card are shown as text: nothing in them makes a browser load a URL."""
    name = "![](http://example.org/a.png)<img src=x>"
    folder = write_adapter(tmp_path / "adapter", backbone, label_names=[name, f"{name}2"], colors=COLORS)
    data = picture(tmp_path / "patch.png", (0.7, 0.5, 0.7)).read_bytes()
    *_, remark = app.answer(Classifier.from_pretrained(folder), data)
    (folder / "README.md").write_text(f"---\n---\n# Title\n{name}\n<details><summary>More</summary></details>\n")
    card = app.card_of(folder)
    for text in (remark, card):
        assert "example.org" in text
        assert "![" not in text
        assert not re.search(r"(?<!\\)<img", text)
    assert "<details><summary>More</summary></details>" in card


def test_a_space_needs_a_backbone_that_it_can_have(adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPE), "--adapter", str(adapter), "--space_dir", str(tmp_path / "space")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "which a Space does not have" in done.stderr
    assert not (tmp_path / "space").exists()


def test_a_page_without_gradio_and_a_space_with_an_idle_backbone(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HistoError, match="--backbone is 'X', which can't act here: a Space loads"):
        app.run(AppOptions(adapter=str(adapter), backbone="X", space_dir=tmp_path / "space"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(HistoError, match="the page needs gradio"):
        app.run(AppOptions(adapter=str(adapter)))


@pytest.mark.skipif("gradio" in MISSING, reason="gradio is not installed")
def test_a_space_holds_all_that_it_needs(space: Path) -> None:
    assert {path.name for path in space.iterdir()} == {"README.md", "adapter", "app.py", "hf_histo", "requirements.txt"}
    needs = (space / "requirements.txt").read_text().split()
    assert any(line.startswith("torch") for line in needs)
    assert not any(line.startswith("pytest") for line in needs)
    settings = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert settings["sdk"] == "gradio"
    assert (space / settings["app_file"]).is_file()
    assert settings["python_version"] >= "3.11"  # the Hub's own is older
    for name in ("README.md", "hf_histo.json", "adapter_config.json"):
        text = (space / "adapter" / name).read_text()
        assert "THIS_FOLDER" not in text
        assert str(space.parent) not in text


def test_the_card_of_the_page_has_no_broken_figures(tmp_path: Path) -> None:
    figure = "![Confusion matrix of val](figures/confusion_val.png)"
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n\n# Title\n\n{figure}\n\nText.\n")
    card = app.card_of(tmp_path)
    assert card.split() == ["#", "Title", "Text."]
