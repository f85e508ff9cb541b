"""The order, the blocks and the gaps of a benchmark's report, from seconds that are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_histo.config import Config, OutputOptions
from hf_histo.config.experiments import BenchmarkOptions
from hf_histo.errors import HistoError
from hf_histo.experiments.benchmark import measure, prediction, steps
from hf_histo.experiments.benchmark.bench import Bench
from hf_histo.experiments.benchmark.timing import Unavailable, in_turn


def test_sides_are_measured_in_turn_each_first_once_and_an_absent_one_is_tried_once() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        if name == "absent":
            raise Unavailable("not installed")
        return len(order)

    names = ("one", "absent", "other")
    found = in_turn({name: lambda name=name: side(name) for name in names}, 2, "test")  # type: ignore[misc]
    assert order == ["one", "absent", "other", "other", "one"]
    assert found == {"one": [1, 5], "absent": "not installed", "other": [3, 4]}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a training step and a prediction by the length of the backbone's name."""

    def measured(bench: Bench, parts: Any) -> dict[str, Any]:
        slow = float(len(bench.config.model.backbone))
        training = {"tuned peer": [2 * slow, 3 * slow], "this package": [slow, slow], steps.FLOOR: [0.5, 0.5]}
        predicted = {"this package": [0.1, 0.1], prediction.OPENVINO: "not installed: pip install openvino"}
        return {"training": training, "prediction": predicted}

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(measure, "measure_images", lambda bench, parts: {})


@pytest.mark.usefixtures("given")
def test_each_backbone_has_a_block_and_the_tuned_peer_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(output=OutputOptions(output_dir=str(tmp_path)))
    measure.benchmark(config, BenchmarkOptions(backbones=["a", "b" * 4], images=32))
    text = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    blocks = text.split("\n## ")
    assert [block.splitlines()[0] for block in blocks[1:]] == ["a", "bbbb"]
    for block, seconds in zip(blocks[1:], ("2.5", "10"), strict=True):
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in block.splitlines() if "|" in line]
        assert rows[2][:2] == ["tuned peer", seconds]
        assert ["OpenVINO, fed from memory", "not installed: pip install openvino", "–", "–"] in rows
        ratio = next(row for row in rows if row[0] == "training: this package")
        assert ratio[1:] == ["tuned peer", "images/s", "2.5", "2 to 3", "–"]
    found = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert found["ratios"]["bbbb"][0]["median"] == 2.5
    assert found["load"].keys() == {"before", "after"}


@pytest.mark.usefixtures("given")
def test_what_was_measured_survives_a_backbone_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure.measure

    def fails(bench: Bench, parts: Any) -> dict[str, Any]:
        if bench.config.model.backbone == "b":
            raise KeyboardInterrupt
        return measured(bench, parts)

    monkeypatch.setattr(measure, "measure", fails)
    config = Config(output=OutputOptions(output_dir=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        measure.benchmark(config, BenchmarkOptions(backbones=["a", "b"], images=32))
    assert list(json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))["blocks"]) == ["a"]


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["training", "speed"]}, "--parts speed: expected some of training, pieces, prediction"),
        ({"backbones": ["a", "b", "a"]}, "--backbones a b a: expected each once"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=message):
        measure.benchmark(Config(output=OutputOptions(output_dir=str(tmp_path))), BenchmarkOptions(**options))
