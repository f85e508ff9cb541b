"""The draft of the reporting checklists: filled from the record, and marked where the authors must add something."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from hf_histo.adapter import checklist, model_card
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.evaluation.predictions import Predictions
from hf_histo.evaluation.reporting import report
from hf_histo.result import Result


def items(result: Result, **changes: object) -> dict[str, dict[str, checklist.Item]]:
    """The items by number, of CLAIM and TRIPOD+AI."""
    sidecar = dataclasses.replace(Sidecar.read(result.adapter), **changes)  # type: ignore[arg-type]
    table = Predictions.read(result.adapter / "predictions" / "test.parquet")
    found = checklist.items(
        model_card.facts(sidecar, result.record, {}), report.error_tables({"test": table}, sidecar.threshold)
    )
    return {name.split()[0]: {item.number: item for item in part} for name, part in found.items()}


def test_every_item_of_claim_is_there_once_and_answered_or_marked(results: dict[str, Result]) -> None:
    claim = items(results["frozen"])["CLAIM"]
    assert list(claim) == [str(number) for number in range(1, 45)]
    assert all(item.recorded or item.blank.startswith(checklist.BLANK) for item in claim.values())
    assert claim["22"].blank == ""
    assert claim["44"].recorded == ""
    assert claim["44"].blank == "To be filled in by the authors."


def test_items_hold_what_was_recorded(results: dict[str, Result]) -> None:
    result = results["frozen"]
    sidecar, found = Sidecar.read(result.adapter), items(result)
    claim, tripod = found["CLAIM"], found["TRIPOD+AI,"]
    assert sidecar.data.fingerprint in claim["7"].recorded
    assert "test: 7 images" in claim["19"].recorded
    assert sidecar.versions["torch"] in claim["23"].recorded
    assert "no group is also in train" in claim["20"].recorded
    accuracy = result.record["splits"]["test"]["overall"]["accuracy"]["value"]
    assert f"test: accuracy {accuracy:.3f}" in claim["37"].recorded
    assert claim["37"].recorded == tripod["23a"].recorded
    assert "called another class: test: " in claim["39"].recorded
    assert str(result.record["options"]["seed"]) in claim["25"].recorded


def test_what_was_not_recorded_is_left_blank(results: dict[str, Result]) -> None:
    sidecar = Sidecar.read(results["frozen"].adapter)
    splits = {name: dataclasses.replace(held, centers={}) for name, held in sidecar.data.splits.items()}
    found = items(results["frozen"], data=dataclasses.replace(sidecar.data, splits=splits), temperature=1.0)
    for number in ("33", "36"):
        assert found["CLAIM"][number].recorded == ""
        assert found["CLAIM"][number].blank.startswith(checklist.BLANK)
    assert found["TRIPOD+AI,"]["23b"].blank == "To be filled in by the authors."
    assert "temperature" not in found["TRIPOD+AI,"]["15"].recorded
    scaled = items(results["frozen"], temperature=2.0)["TRIPOD+AI,"]["15"]
    assert "a temperature of 2.000, fitted on val" in scaled.recorded
    assert found["CLAIM"]["31"].recorded == ""  # without a figure of explanations


def test_the_markdown_beside_the_adapter_is_that_of_the_report(results: dict[str, Result]) -> None:
    result = results["frozen"]
    lines = (result.adapter.parent / "checklist.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.match(r"\| \d+[a-z]? \|", line)]
    assert len(rows) == sum(map(len, items(result).values()))
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
    assert "**To be filled in by the authors.**" in lines[-2] + "\n".join(rows)
    page = (result.adapter / "report.html").read_text(encoding="utf-8")
    folded = page[page.rindex("<details>") :]
    assert folded.count("<tr><td>") == len(rows)
    assert "<mark>To be filled in by the authors.</mark>" in folded


def test_names_from_data_are_text(results: dict[str, Result]) -> None:
    result = results["frozen"]
    sidecar = dataclasses.replace(Sidecar.read(result.adapter), label_names=["<script>|", "*b*"])
    text = checklist.text(sidecar, result.record, {}, {"Where the model sees <b>": Path("x.png")})
    assert "<script>" not in text
    assert "<b>" not in text
