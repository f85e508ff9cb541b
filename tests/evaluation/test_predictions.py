"""The predictions table: what it accepts, and that a file gives back what was written."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_histo.errors import HistoError
from hf_histo.evaluation import predictions as tables
from hf_histo.evaluation.predictions import Predictions


def small(logits: object = (0.5, -1.0, 40.0), **changes: object) -> Predictions:
    columns = {"ids": ["a", "b", "c"], "centers": [0, 3, -1], "groups": ["p", None, ""], "labels": [1, 0, -1]}
    return Predictions.make(**columns | changes, logits=np.array(logits))  # type: ignore[arg-type]


def test_columns_and_types() -> None:
    table = small()
    assert list(table.columns) == list(tables.COLUMNS)
    assert table["center"].dtype == table["label"].dtype == np.int64
    assert table["logit"].dtype == table["probability"].dtype == np.float64
    assert table["group"].tolist() == ["p", "", ""]
    np.testing.assert_allclose(table["probability"][:2], 1 / (1 + np.exp([-0.5, 1.0])))


def test_names_and_marks_can_be_given() -> None:
    table = small(label_names=["normal", "tumor"], transductive=["color statistics"])
    assert table.is_named
    assert (table.label_names, table.transductive) == (["normal", "tumor"], ["color statistics"])
    assert (small().label_names, small().transductive) == (["0", "1"], None)


def test_one_column_of_logits_is_one_logit() -> None:
    pd.testing.assert_frame_equal(small(), small([[0.5], [-1.0], [40.0]]))


def test_probabilities_do_not_overflow() -> None:
    assert tables.probabilities(np.array([-1000.0, 0.0, 1000.0])).tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(tables.probabilities(np.array([[1000.0, 1000.0, -1000.0]])), [[0.5, 0.5, 0]])


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_round_trip(tmp_path: Path, classes: int) -> None:
    logits = np.random.default_rng(0).normal(size=(3, classes))
    names = ["normal", "tumor"] if classes < 3 else list("vwxyz")
    table = small(logits)
    table["probability"] = (table.probabilities * 0.5).tolist()  # as in a calibrated table
    table.with_label_names(names).write(tmp_path / "test.parquet")
    again = Predictions.read(tmp_path / "test.parquet")
    assert again.attrs["label_names"] == again.label_names == names
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert again.logits.shape == ((3,) if classes == 1 else (3, classes))
    assert [file.name for file in tmp_path.iterdir()] == ["test.parquet"]


@pytest.mark.parametrize("measured", [[], ["color statistics"]])
def test_a_file_records_what_was_measured_on_its_own_images(tmp_path: Path, measured: list[str]) -> None:
    table = small()
    table.with_label_names(["normal", "tumor"]).write(tmp_path / "older.parquet")
    table.attrs["transductive"] = measured
    table.with_label_names(["normal", "tumor"]).write(tmp_path / "test.parquet")
    assert Predictions.read(tmp_path / "test.parquet").attrs["transductive"] == measured
    assert "transductive" not in Predictions.read(tmp_path / "older.parquet").attrs


def test_probabilities_of_0_and_1_are_read(tmp_path: Path) -> None:
    small([-1000.0, 0.0, 1000.0]).with_label_names(["normal", "tumor"]).write(tmp_path / "test.parquet")
    assert Predictions.read(tmp_path / "test.parquet")["probability"].tolist() == [0, 0.5, 1]


def test_file_made_by_pandas_is_read(tmp_path: Path) -> None:
    small([[0.0, 1.0, 2.0]] * 3).assign(more=1).to_parquet(tmp_path / "test.parquet")
    read = Predictions.read(tmp_path / "test.parquet")
    assert read.attrs["label_names"] == ["0", "1", "2"]
    assert list(read.columns) == list(tables.COLUMNS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": [0.5, np.nan, np.inf]}, "2 images are NaN or infinite, the first ids: b, c"),
        ({"logits": [[0.5, 1.0], [0.5, np.nan], [1.0, 1.0]]}, "the first ids: b"),
        ({"logits": [0.5, 1.0]}, "2 rows of logits"),
        ({"logits": np.zeros((3, 2, 2))}, "shape"),
        ({"ids": ["a", "b", "a"]}, "more than once: a"),
        ({"labels": [0, 1]}, "'labels': 2"),
        ({"labels": [0, 1, 2]}, "label 2 of id c, expected -1"),
        ({"labels": [0, 1, -2]}, "label -2 of id c"),
        ({"labels": [0.0, 1.0, 0.5]}, "labels have shape"),
    ],
)
def test_bad_columns_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(HistoError, match=message) as error:
        small(**changes)
    assert "\n" not in str(error.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.parquet"
    small().with_label_names(["normal", "tumor"]).write(good)
    (tmp_path / "text.parquet").write_text("id,label\n")
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-100])
    pd.read_parquet(good).drop(columns="group").to_parquet(tmp_path / "narrow.parquet")
    small().assign(label=[0.0, 1.0, 0.5]).to_parquet(tmp_path / "labels.parquet")
    small().assign(logit=[0.0, None, 0.5]).to_parquet(tmp_path / "null.parquet")
    small().assign(logit=[[0.0, 1.0], [1.0], [0.5, 1.0]]).to_parquet(tmp_path / "ragged.parquet")
    small().assign(probability=[0.0, 1.0, 1.5]).to_parquet(tmp_path / "probability.parquet")
    expected = {
        "absent": "is not a file",
        "text": "can't be read as parquet",
        "cut": "can't be read as parquet",
        "narrow": r"lacks the columns \['group'\]",
        "labels": "labels have shape",
        "null": "NaN",
        "ragged": "ragged",
        "probability": "column probability",
    }
    for name, message in expected.items():
        with pytest.raises(HistoError, match=message) as error:
            Predictions.read(tmp_path / f"{name}.parquet")
        assert str(tmp_path / f"{name}.parquet") in str(error.value)


def test_files_made_to_do_harm_are_refused(tmp_path: Path) -> None:
    """Each file is small, but would fill the memory, or crash a reader that trusts it."""
    write = {"row_group_size": 10**7, "use_dictionary": True}
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(9_000_000, np.int8)), ["a"])
    pq.write_table(pa.table({name: rows for name in tables.COLUMNS}), tmp_path / "rows.parquet", **write)
    small().assign(group="x" * 5000).to_parquet(tmp_path / "text.parquet")
    good = pa.Table.from_pandas(small(), preserve_index=False)
    hostile = {"deep": "[" * 100_000, "json": "{", "names": '["a"]', "same": '["a", "a"]', "kinds": '[1, {"a": 2}]'}
    for name, metadata in hostile.items():
        pq.write_table(good.replace_schema_metadata({"label_names": metadata}), tmp_path / f"{name}.parquet")
    pq.write_table(good.replace_schema_metadata({"transductive": '{"a": 2}'}), tmp_path / "marked.parquet")
    expected = {
        "rows": "rows, expected at most",
        "text": "group has a text of 5000 bytes",
        "names": "expected 2 different names",
        "same": "expected 2 different names",
        "marked": "its transductive are not a list of strings",
    }
    for name in ("rows", "text", "marked", *hostile):
        file = tmp_path / f"{name}.parquet"
        assert file.stat().st_size < 2**20
        with pytest.raises(HistoError, match=expected.get(name, "label_names are not a list of strings")) as error:
            Predictions.read(file)
        assert str(file) in str(error.value)


def test_limits_hold_for_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, long = tmp_path / "test.parquet", tmp_path / "long.parquet"
    n = 5000  # several batches, each below the limit
    Predictions.make(range(n), [0] * n, [""] * n, [0] * n, np.zeros(n)).with_label_names(["normal", "tumor"]).write(
        file
    )
    assert len(Predictions.read(file)) == n
    monkeypatch.setattr(tables, "MAX_BYTES", 100_000)
    with pytest.raises(HistoError, match=r"test\.parquet: more than 100000 bytes"):
        Predictions.read(file)
    small(ids=["a", "b", "x" * 5000]).to_parquet(long)
    with pytest.raises(HistoError, match="id has a text of 5000 bytes"):
        Predictions.read(long)


def test_a_file_without_images_is_read(tmp_path: Path) -> None:
    small()[:0].with_label_names(["normal", "tumor"]).write(tmp_path / "test.parquet")
    assert len(Predictions.read(tmp_path / "test.parquet")) == 0


def test_names_must_match_the_classes(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match="2 classes"):
        small().with_label_names(["normal", "tumor", "other"]).write(tmp_path / "test.parquet")
    assert not list(tmp_path.iterdir())


HARMLESS = ["slide_3/patch-7.png", "0012", "-1", "+4", "3.5", "ä b", "a=b", "patient@x", "1e5"]
HARMFUL = {
    "=cmd|' /C calc'!A0": "'=cmd|' /C calc'!A0",
    '=HYPERLINK("http://x","y")': '\'=HYPERLINK("http://x","y")',
    "+1+cmd": "'+1+cmd",
    "-2+3": "'-2+3",
    "-٣": "'-٣",
    "@SUM(A1)": "'@SUM(A1)",
    "＝1": "'＝1",
    "\t=1": "'\\t=1",
    "\r=1": "' =1",
    "\x1b]0;owned\x07": "\\x1b]0;owned\\x07",
    "a\x9b2J": "a\\x9b2J",
    "a\u202egnp.exe": "a\\u202egnp.exe",
    "two\nlines": "two lines",
}


def test_no_id_or_name_acts_in_a_spreadsheet_or_terminal(tmp_path: Path) -> None:
    ids = [*HARMLESS, *HARMFUL]
    table = Predictions.make(ids, [0] * len(ids), [""] * len(ids), [-1] * len(ids), np.ones(len(ids)))
    table.attrs["label_names"] = ["normal", "=tumor\x1b[2J"]
    table.assign(calibrated=table["probability"]).write_submission(tmp_path / "preds.csv", details=True)
    text = (tmp_path / "preds.csv").read_bytes().decode()
    assert all(character.isprintable() or character == "\n" for character in text)
    written = pd.read_csv(tmp_path / "preds.csv", dtype={"ID": str})
    assert written["ID"].tolist() == [*HARMLESS, *HARMFUL.values()]
    assert set(written["Label"]) == {"'=tumor\\x1b[2J"}


@pytest.mark.parametrize(("threshold", "called"), [(0.5, [1, 0, 1]), (0.9, [0, 0, 1])])
def test_a_submission_of_two_classes_is_of_class_1_at_its_threshold(
    tmp_path: Path, threshold: float, called: list[int]
) -> None:
    for logits in ([1.0, -1.0, 5.0], [[0.0, 1.0], [1.0, 0.0], [0.0, 5.0]]):
        table = small(logits)
        table.attrs["label_names"] = ["normal", "tumor"]
        table["calibrated"] = [0.1, 0.2, 0.3] if table["logit"].dtype == float else [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]
        table.write_submission(tmp_path / "preds.csv", threshold, details=True)
        written = pd.read_csv(tmp_path / "preds.csv")
        assert list(written) == ["ID", "Pred", "Prob", "Label", "Calibrated"]
        assert written["Pred"].tolist() == called
        assert written["Label"].tolist() == [["normal", "tumor"][call] for call in called]
        np.testing.assert_allclose(written["Prob"], table.positive_probability)
        np.testing.assert_allclose(written["Calibrated"], [0.1, 0.2, 0.3])


def test_an_id_is_one_cell_where_semicolons_separate(tmp_path: Path) -> None:
    plain, several = (tmp_path / name for name in ("plain.csv", "several.csv"))
    small().write_submission(plain)
    assert plain.read_text().startswith("ID,Pred,Prob\na,1,")
    small(ids=["a", "b;=1+1", "c"]).write_submission(several)
    assert '\n"b;=1+1",' in several.read_text()
    assert pd.read_csv(several)["ID"].tolist() == ["a", "b;=1+1", "c"]


def test_ids_that_would_become_the_same_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match="ids are the same"):
        small(ids=["=1", "'=1", "c"]).write_submission(tmp_path / "preds.csv")
    assert not list(tmp_path.iterdir())


def test_predicted_class() -> None:
    assert small([0.0, -0.1, 3.0]).predicted_classes().tolist() == [1, 0, 1]
    assert small([0.0, -0.1, 3.0]).predicted_classes(threshold=0.9).tolist() == [0, 0, 1]
    assert small([[0.0, 0.0], [1.0, 0.9], [0.0, 3.0]]).predicted_classes().tolist() == [1, 0, 1]
    assert small(np.eye(3)).predicted_classes(threshold=0.9).tolist() == [0, 1, 2]
    with pytest.raises(HistoError, match="threshold is 2"):
        small().predicted_classes(threshold=2)


def test_log_odds_are_those_of_the_probabilities() -> None:
    for logits in (np.array([0.5, -1.0, 2.0]), np.random.default_rng(0).normal(size=(3, 4))):
        table = small(logits)
        p = table.probabilities.reshape(3, -1)
        odds = table.class_log_odds[:, table.ranked_classes]
        np.testing.assert_allclose(odds, np.log(p / (1 - p)))
    np.testing.assert_allclose(small([[1.0, 3.0]] * 3).class_log_odds, [[-2, 2]] * 3)


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_one_logit_or_several_look_the_same_from_outside(columns: int) -> None:
    logits = np.random.default_rng(0).normal(size=(3, columns))
    table = small(logits[:, 0] if columns == 1 else logits, labels=[0, 1, -1])
    classes = max(2, columns)
    assert table.num_classes == classes
    assert table.class_probabilities.shape == table.class_logits.shape == (3, classes)
    np.testing.assert_allclose(table.class_probabilities, tables.probabilities(table.class_logits))
    assert table.predicted_classes().tolist() == table.class_logits.argmax(axis=1).tolist()
    np.testing.assert_allclose(table.with_temperature(2).class_logits, table.class_logits / 2)


def test_selections_and_copies_keep_names_and_marks() -> None:
    table = small().with_label_names(["normal", "tumor"])
    table.attrs["transductive"] = ["color statistics"]
    for part in (table[:1], table.labeled, table.copy(), table.with_logits(table.logits), table.assign(more=1)):
        assert isinstance(part, Predictions)
        assert (part.label_names, part.transductive) == (["normal", "tumor"], ["color statistics"])
    assert not small().is_named
    with pytest.raises(HistoError, match="2 classes: pass one name"):
        table.with_label_names(["one"])
