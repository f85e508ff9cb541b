"""Options that arrange the data have an effect in each recipe, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from miniature import divide_training, write_data

from hf_histo.config import Config, parse
from hf_histo.data.load import fingerprint
from hf_histo.data.protocol import prepare, refuse
from hf_histo.data.splits import leakage
from hf_histo.errors import HistoError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data") / "data", {"train": 24, "val": 16, "test": 8})
    divide_training(folder)
    return folder


def test_each_option_arranges_the_data(data: Path) -> None:
    options = ([], ["--pool_centers"], ["--split=published"], ["--split=clean"])
    found = [prepare(parse(None, [f"--data={data}", *more])) for more in options]
    assert len({fingerprint(arranged) for arranged in found}) == len(options)
    assert [leakage.were_searched(arranged) for arranged in found] == [False, False, True, True]
    assert set(found[1]["train"]["center"]) == {0, 1, 3}


def test_an_option_without_effect_is_refused() -> None:
    refuse(Config(), {"pool_centers": "one center is held out"})
    with pytest.raises(HistoError, match=r"--pool_centers is True, which can't act here: one center is held out"):
        refuse(parse(None, ["--pool_centers"]), {"pool_centers": "one center is held out"})


def test_pooled_centers_are_split_alike_for_every_seed(data: Path) -> None:
    found = [prepare(parse(None, [f"--data={data}", "--pool_centers", f"--seed={seed}"])) for seed in (0, 1)]
    assert fingerprint(found[0]) == fingerprint(found[1])  # so that runs of both can make an ensemble
