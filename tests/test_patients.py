"""Nothing in DICOM files that names a patient leaves them: a whole run, and all that it writes and prints, searched."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dicom_files import SECRET, content, dicom, planted, write_dicom
from miniature import config, write_backbone
from safetensors import safe_open

from hf_histo.app import answer
from hf_histo.config import DataOptions, parse_command
from hf_histo.config.commands import PredictOptions
from hf_histo.data.load import load
from hf_histo.data.protocol import prepare
from hf_histo.errors import HistoError
from hf_histo.experiments.predict import predict
from hf_histo.finetune import run_config
from hf_histo.inference import Classifier

# The name, the id of a patient as the file has it, the birth date, and the UID of the study.
TRACES = re.compile(rb"wilhelmine|18880229|1\.2\.826\.0\.1\.3680043\.99\.4711", re.IGNORECASE)
WINDOW = "--window=1500,3000"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 scans, two of each patient, with names in every text element; those of label 1 are darker."""
    folder = tmp_path_factory.mktemp("hospital")
    rows = []
    for number in range(48):
        pixels = np.random.default_rng(number).integers(0, 4096, (32, 32)).astype(np.uint16) // (1 + 2 * (number % 2))
        file = planted(dicom(pixels, BitsStored=12, WindowCenter=2048, WindowWidth=4096), str(number // 2))
        write_dicom(folder / f"scans/{number}.dcm", file)
        rows.append((f"scans/{number}.dcm", "ab"[number % 2], ("train", "train", "val", "test")[number // 2 % 4]))
    pd.DataFrame(rows, columns=["path", "label", "split"]).to_csv(folder / "scans.csv", index=False)
    assert TRACES.search((folder / "scans/0.dcm").read_bytes())
    return folder / "scans.csv"


def searchable(path: Path) -> bytes:
    """The bytes of a file, and what they are uncompressed."""
    data = path.read_bytes()
    if path.suffix == ".parquet":
        data += repr(pq.read_table(path).to_pydict()).encode() + repr(pq.read_schema(path).metadata).encode()
    elif path.suffix == ".arrow":
        data += repr(datasets.Dataset.from_file(str(path)).with_format("arrow")[:].to_pydict()).encode()
    elif path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            data += repr(file.metadata()).encode()
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data += b"".join(archive.read(name) for name in archive.namelist())
    return data


def test_a_run_on_dicom_leaves_no_trace_of_patients(
    table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bad = planted(dicom(np.zeros((4, 4), np.uint16), PixelData=b"12"), "99")
    write_dicom(tmp_path / "other/bad.dcm", bad)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        cache = f"--cache_dir={tmp_path / 'written/cache'}"
        backbone = write_backbone(tmp_path / "backbone")
        options = config(tmp_path / "written/run", backbone, table, WINDOW, cache, "--num_train_epochs=1")
        data = prepare(options)
        result = run_config(options, data)
        output = tmp_path / "written/predictions.csv"
        arguments = [f"--adapter={result.adapter}", f"--data={table}", f"--output={output}", "--details", cache]
        print(predict(parse_command(PredictOptions, None, arguments)))
        print(answer(Classifier.from_pretrained(result.adapter), content(bad)))
        for broken in ("a", "b"):
            write_dicom(tmp_path / f"other/{broken}/bad.dcm", bad)
        (tmp_path / "other/bad.dcm").unlink()
        with pytest.raises(HistoError) as error:
            load(tmp_path / "other", cache_dir=tmp_path / "written/cache")
        with pytest.raises(HistoError):
            load(tmp_path / "other", cache_dir=tmp_path / "written/cache", on_bad_image="skip")
    assert {group for rows in data.values() for group in rows["group"]} == {f"patient {n}" for n in range(1, 25)}
    written = [path for path in (tmp_path / "written").rglob("*") if path.is_file()]
    assert {".arrow", ".parquet", ".safetensors", ".json", ".md", ".csv"} <= {path.suffix for path in written}
    for path in written:
        assert not TRACES.search(searchable(path)), path
    assert not TRACES.search((printed.getvalue() + caplog.text + str(error.value)).encode())
    assert not any(TRACES.search(str(path).encode()) for path in (tmp_path / "written").rglob("*"))

    # The same way of reading at prediction, and what contradicts it refused.
    classifier = Classifier.from_pretrained(result.adapter)
    assert json.loads((result.adapter / "hf_histo.json").read_text())["preprocessing"]["window"] == [1500, 3000]
    expected = pd.read_parquet(result.adapter / "predictions/test.parquet").set_index("id")["logit"]
    alone = classifier(table.parent / expected.index[1])["logit"][0]
    assert alone == pytest.approx(expected.iloc[1], abs=1e-5)
    with pytest.raises(HistoError, match="--window is 40,400, expected --window=1500,3000 as in training"):
        predict(parse_command(PredictOptions, None, [*arguments, "--window=40,400"]))
    own = load(DataOptions(data=str(table), cache_dir=str(tmp_path / "cache")))["test"]
    with pytest.raises(HistoError, match="images were read with --window=file, expected --window=1500,3000 as in"):
        classifier.predict(own)


def test_the_search_finds_what_is_compressed(tmp_path: Path) -> None:
    name = [f"{SECRET}^A"] * 1000
    pq.write_table(pa.table({"id": name}), tmp_path / "a.parquet", compression="zstd")
    datasets.Dataset.from_dict({"id": name}).save_to_disk(tmp_path / "rows")
    files = [tmp_path / "a.parquet", *(tmp_path / "rows").glob("*.arrow")]
    assert len(files) == 2 and all(TRACES.search(searchable(path)) for path in files)
