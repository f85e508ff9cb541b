"""Predictions of a model, one row per image: the input of all metrics and figures.

`Predictions` is a `pandas.DataFrame` with these columns:

| column | dtype | meaning |
|---|---|---|
| `id` | str | the key of the image in its source, unique |
| `center` | int64 | acquisition center, -1 where unknown |
| `group` | str | patient, slide or tile family; "" where unknown: the image counts as its own group |
| `label` | int64 | class index, -1 where hidden |
| `logit` | float64, or K of them | one logit of the positive class (label 1), or one per class |
| `probability` | float64, or K of them | sigmoid or softmax of `logit`, in [0, 1] |

Only the class distinguishes tables of one logit and of K: other code uses `class_probabilities` (n, K),
`positive_probability`, `class_log_odds`, `task_logits` or `predicted_classes`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logsumexp, softmax

from hf_histo.data.schema import center_name
from hf_histo.errors import HistoError, printable
from hf_histo.files import atomic_file

COLUMNS = ("id", "center", "group", "label", "logit", "probability")
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")  # start of a spreadsheet formula
MAX_ROWS, MAX_BYTES, MAX_NAME = 5_000_000, 2**31, 4096  # largest file, in rows and bytes, and longest text, in bytes


def probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return the sigmoid of logits of shape (n,), or the softmax over the last axis of logits of shape (n, K)."""
    logits = np.asarray(logits, dtype=np.float64)
    found: NDArray[np.float64] = expit(logits) if logits.ndim == 1 else softmax(logits, axis=-1)
    return found


def decided(probabilities: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """Classes (...) of probabilities (..., K); `threshold` is that of class 1, where there are two."""
    if probabilities.shape[-1] == 2:
        return (probabilities[..., 1] >= threshold).astype(np.int64)
    most: NDArray[np.int64] = probabilities.argmax(axis=-1)
    return most


def measured(*, colors: bool, batch_norm: bool) -> list[str]:
    """What was measured on the images that are predicted, in the words of `Predictions.transductive`."""
    named = {"color statistics": colors, "batch-norm statistics": batch_norm}
    return [what for what, used in named.items() if used]


def independent_groups(groups: pd.Series[str], ids: pd.Series[str]) -> pd.Series[str]:
    """The group of each row; an image of unknown group ("") is its own: no group name starts with a null character."""
    return groups.where(groups != "", "\0" + ids)


class Predictions(pd.DataFrame):
    """A table of predictions: a `pandas.DataFrame` with the columns described in this module, and any others.

    Selections of rows, copies and concatenations are `Predictions` with the same class names.
    """

    @property
    def _constructor(self) -> type[Predictions]:
        return Predictions

    @classmethod
    def make(
        cls,
        ids: Iterable[Any],
        centers: ArrayLike,
        groups: Iterable[str | None],
        labels: ArrayLike,
        logits: ArrayLike,
        *,
        label_names: Sequence[str] | None = None,
        center_names: Sequence[str] = (),
        transductive: Sequence[str] | None = None,
    ) -> Self:
        """Build a table.

        Args:
            ids: n keys, unique once written as text.
            centers: (n,) integers, -1 where unknown.
            groups: n names; "" or None where unknown.
            labels: (n,) integers in [-1, K), -1 where hidden.
            logits: (n,) or (n, 1) for one logit of the positive class, (n, K) for one logit per class, K >= 2.
            label_names: K class names, "0", "1", ... by default.
            center_names: names of the centers by number; none if they have numbers alone.
            transductive: see the property `transductive`.

        Raises:
            HistoError: lengths differ, an id occurs twice, a logit isn't finite, a label isn't a class.
        """
        ids = [str(key) for key in ids]
        groups = [group or "" for group in groups]
        centers, labels = _integers("centers", centers), _integers("labels", labels)
        logits = np.asarray(logits, dtype=np.float64)
        if logits.ndim == 2 and logits.shape[1] == 1:
            logits = logits[:, 0]
        if logits.ndim not in (1, 2):
            raise HistoError(f"logits have shape {logits.shape}, expected (n,), (n, 1) or (n, K): pool them first")
        lengths = {"ids": len(ids), "centers": len(centers), "groups": len(groups), "labels": len(labels)}
        if wrong := {name: length for name, length in lengths.items() if length != len(logits)}:
            raise HistoError(f"{len(logits)} rows of logits but {wrong}: pass one value per image")
        index = pd.Series(ids, dtype=str)
        if index.duplicated().any():
            raise HistoError(f"ids occur more than once: {_first(index[index.duplicated()])}; pass each image once")
        finite = np.isfinite(logits).all(axis=tuple(range(1, logits.ndim)))
        if not finite.all():
            raise HistoError(
                f"logits of {(~finite).sum()} images are NaN or infinite, the first ids: {_first(index[~finite])}; "
                "training diverged or overflowed: lower the learning rate or train in fp32"
            )
        classes = 2 if logits.ndim == 1 else logits.shape[1]
        invalid = (labels < -1) | (labels >= classes)
        if invalid.any():
            raise HistoError(
                f"label {labels[invalid][0]} of id {_first(index[invalid][:1])}, expected -1 (hidden) to "
                f"{classes - 1}: give the model as many outputs as there are classes"
            )
        columns = {
            "id": index,
            "center": centers,
            "group": pd.Series(groups, dtype=str),
            "label": labels,
            "logit": logits.tolist(),
            "probability": probabilities(logits).tolist(),
        }
        table = cls(columns)
        if logits.ndim == 1:
            table = table.astype({"logit": np.float64, "probability": np.float64})
        if center_names:
            table.attrs["center_names"] = list(center_names)
        if transductive is not None:
            table.attrs["transductive"] = list(transductive)
        return table if label_names is None else table.with_label_names(label_names)

    @property
    def label_names(self) -> list[str]:
        """K class names; "0", "1", ... if none were given."""
        return self.attrs.get("label_names") or [str(place) for place in range(self.num_classes)]

    @property
    def is_named(self) -> bool:
        """Whether class names were given."""
        return "label_names" in self.attrs

    @property
    def transductive(self) -> list[str] | None:
        """Quantities that were measured on the table's own unlabeled images to predict them; None if not recorded.

        E.g. "color statistics" or "batch-norm statistics": predictions of single images would differ.
        """
        found: list[str] | None = self.attrs.get("transductive")
        return found

    @property
    def num_classes(self) -> int:
        """K, at least 2."""
        logits = self.logits
        return 2 if logits.ndim == 1 else logits.shape[1]

    @property
    def labeled(self) -> Self:
        """The rows whose label is not hidden."""
        return self[self["label"] >= 0]

    @property
    def center_names(self) -> list[str]:
        """Names of the centers by number; none if they have numbers alone."""
        return self.attrs.get("center_names") or []

    @property
    def known_centers(self) -> dict[str, Self]:
        """The rows of each known acquisition center by its name, or number as text, in rising order of numbers."""
        numbers = sorted(set(self["center"]) - {-1})
        return {center_name(number, self.center_names): self[self["center"] == number] for number in numbers}

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class indices, (n,), -1 where hidden."""
        return self["label"].to_numpy(np.int64)

    @property
    def logits(self) -> NDArray[np.float64]:
        """Logits as stored, (n,) or (n, K)."""
        return self.numbers("logit")

    @property
    def class_logits(self) -> NDArray[np.float64]:
        """Logits whose softmax is the probability of each class, (n, K); one stored logit becomes (0, logit)."""
        logits = self.logits
        return np.stack([np.zeros_like(logits), logits], axis=1) if logits.ndim == 1 else logits

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Probabilities as stored, (n,) of class 1, or (n, K), in [0, 1]."""
        return self.numbers("probability")

    @property
    def class_probabilities(self) -> NDArray[np.float64]:
        """Probability of each class, (n, K), in [0, 1]."""
        return self.by_class("probability")

    @property
    def positive_probability(self) -> NDArray[np.float64]:
        """Probability of class 1, (n,), of a table with two classes.

        Raises:
            HistoError: there are more than two classes.
        """
        probability = self.class_probabilities
        if probability.shape[1] > 2:
            raise HistoError(
                f"the predictions are of {probability.shape[1]} classes, expected two: no one class is positive"
            )
        return probability[:, 1]

    @property
    def class_log_odds(self) -> NDArray[np.float64]:
        """log(p / (1 - p)) of each class, (n, K).

        It ranks rows as the probability does, but without ties: in float64, the sigmoid of logits above 37 is 1.
        """
        logits = self.logits
        if logits.ndim == 1 or logits.shape[1] == 2:
            positive = logits if logits.ndim == 1 else logits[:, 1] - logits[:, 0]
            return np.stack([-positive, positive], axis=1)
        rest = [logsumexp(np.delete(logits, c, axis=1), axis=1) for c in range(logits.shape[1])]
        odds: NDArray[np.float64] = logits - np.stack(rest, axis=1)
        return odds

    @property
    def task_logits(self) -> NDArray[np.float64]:
        """Logits in the same shape for all tables of a task: (n,) of class 1 for two classes, else (n, K)."""
        return self.class_log_odds[:, 1] if self.num_classes == 2 else self.logits

    @property
    def ranked_classes(self) -> range:
        """The classes whose log odds rank rows: all, but of two only class 1, since class 0 gives the reverse order."""
        return range(1, 2) if self.num_classes == 2 else range(self.num_classes)

    def numbers(self, column: str) -> NDArray[np.float64]:
        """A column with one number or K numbers per row, as an array (n,) or (n, K)."""
        return np.array(self[column].tolist(), dtype=np.float64)

    def by_class(self, column: str) -> NDArray[np.float64]:
        """A column of probabilities, stored as (n,) or (n, K), as probabilities of each class, (n, K)."""
        probability = self.numbers(column)
        return np.stack([1 - probability, probability], axis=1) if probability.ndim == 1 else probability

    def predicted_classes(self, threshold: float = 0.5) -> NDArray[np.int64]:
        """Predicted class of each row, (n,).

        With two classes, it is 1 if the probability of class 1 is at least `threshold`; with more, the most probable
        class (the first one on a tie), and `threshold` has no effect.

        Raises:
            HistoError: `threshold` is outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise HistoError(f"threshold is {threshold}, expected a probability: pass a number from 0 to 1")
        return decided(self.class_probabilities, threshold)

    def with_label_names(self, label_names: Sequence[str]) -> Self:
        """The same table with these class names.

        Raises:
            HistoError: the number of names is not the number of classes.
        """
        if len(label_names) != self.num_classes:
            raise HistoError(
                f"label_names are {list(label_names)} but the logits are of {self.num_classes} classes: pass one name "
                "each"
            )
        table = self.copy(deep=False)
        table.attrs = {**self.attrs, "label_names": list(label_names)}
        return table

    def with_logits(self, logits: ArrayLike) -> Self:
        """The same images with other logits, in a shape that `make` takes; additional columns are dropped."""
        table = self.make(self["id"], self["center"], self["group"], self["label"], logits)
        table.attrs.update(self.attrs)
        return table

    def with_temperature(self, temperature: float) -> Self:
        """The table with `logit` divided by `temperature`, and the resulting `probability`; other columns are dropped.

        With two classes, the ranking of rows, the AUROC and the classes predicted at a threshold of 0.5 don't change.

        Raises:
            HistoError: `temperature` isn't a finite positive number.
        """
        if not (np.isfinite(temperature) and temperature > 0):
            raise HistoError(
                f"temperature is {temperature}, expected a finite number above 0: fit_temperature gives one"
            )
        return self.with_logits(self.logits / temperature)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a table from parquet; its classes are named "0", "1", ... if the file has no names.

        Raises:
            HistoError: the file is missing, isn't parquet, lacks a column, or holds values that `make` refuses.
        """
        path = Path(path)
        if not path.is_file():
            raise HistoError(f"{path} is not a file: pass a predictions file that a training recipe wrote (.parquet)")
        try:
            table = _table(path)
        except (pa.ArrowException, OSError, MemoryError, ValueError, LookupError, TypeError) as error:
            raise HistoError(f"{path} can't be read as parquet: pass a complete predictions file ({error})") from None
        columns = {name: table[name].to_pylist() for name in COLUMNS}
        try:
            logits, probability = (np.array(columns[name], dtype=np.float64) for name in ("logit", "probability"))
            predictions = cls.make(columns["id"], columns["center"], columns["group"], columns["label"], logits)
        except (HistoError, ValueError, TypeError) as error:
            raise HistoError(f"{path}: {error}") from None
        if probability.shape != logits.shape or not ((probability >= 0) & (probability <= 1)).all():
            raise HistoError(f"{path}: column probability isn't one number in [0, 1] per logit: predict again")
        # Keep the stored probabilities: those of a calibrated table are not the sigmoid or softmax of its logits.
        predictions["probability"] = probability.reshape(predictions.logits.shape).tolist()
        expected = predictions.label_names
        names, transductive = (_texts(path, table.schema, name) for name in ("label_names", "transductive"))
        if names is not None and not len(names) == len(set(names)) == len(expected):
            raise HistoError(
                f"{path}: its label_names are {names}, expected {len(expected)} different names: predict again"
            )
        predictions.attrs["label_names"] = names or expected
        centers = _texts(path, table.schema, "center_names") or []
        if centers and not (len(centers) == len(set(centers)) > predictions["center"].max()):
            raise HistoError(
                f"{path}: its center_names are {centers}, expected a different one for each: predict again"
            )
        if centers:
            predictions.attrs["center_names"] = centers
        if transductive is not None:
            predictions.attrs["transductive"] = transductive
        return predictions

    def write(self, path: str | Path) -> None:
        """Write the table as parquet, atomically; names and `transductive` go into the metadata as JSON lists."""
        logits = self.logits
        number = pa.float64() if logits.ndim == 1 else pa.list_(pa.float64(), logits.shape[1])
        types = (pa.string(), pa.int64(), pa.string(), pa.int64(), number, number)
        schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
        table = pa.Table.from_pandas(self, schema=schema, preserve_index=False)
        lists = {"label_names": self.label_names, "transductive": self.transductive}
        lists["center_names"] = self.center_names or None
        metadata = {name: json.dumps(values) for name, values in lists.items() if values is not None}
        with atomic_file(path) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary)

    def write_submission(self, path: str | Path, threshold: float = 0.5, *, details: bool = False) -> None:
        """Write the table as a CSV with a header, one row per image in the table's order, atomically.

        Spreadsheets run a cell that starts with =, +, -, @, a tab or a line break as a formula, so such an id or name
        gets a leading apostrophe, unless it is a number (https://owasp.org/www-community/attacks/CSV_Injection).
        Control characters are written as escapes, which a terminal ignores. All other text is unchanged.

        Columns: `ID`, the image's key; `Pred`, the class index that `predicted_classes` gives at `threshold`; `Prob`,
        the probability of class 1, or, with more than two classes, of the predicted class. `details`, which requires
        the column `calibrated`, adds `Label`, the name of class `Pred`, and `Calibrated`, the calibrated value of
        `Prob`. A table with prediction sets (see `hf_histo.evaluation.prediction_sets`) adds `Set`, the names of the
        classes in it, separated by " | ", and `Decision`.

        Raises:
            HistoError: `threshold` is outside [0, 1], or two ids are the same after escaping.
        """
        chosen = self.predicted_classes(threshold)
        shown = chosen if self.num_classes > 2 else np.ones_like(chosen)
        rows = np.arange(len(chosen))
        ids = self["id"].map(harmless)
        if len(same := ids[ids.duplicated()]):
            found = _first(same)
            raise HistoError(f"ids are the same after escaping for spreadsheets: {found}; rename the images")
        columns = {"ID": ids, "Pred": chosen, "Prob": self.class_probabilities[rows, shown]}
        if details:
            names = np.array([harmless(name) for name in self.label_names])
            columns |= {"Label": names[chosen], "Calibrated": self.by_class("calibrated")[rows, shown]}
        if "set" in self:
            sets = self["set"].map(" | ".join)
            columns |= {"Set": sets.map(harmless), "Decision": self["decision"].map(harmless)}
        # In many locales spreadsheets separate cells by semicolons: an unquoted one would start a new cell.
        quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if ids.str.contains(";").any() else csv.QUOTE_MINIMAL
        with atomic_file(path) as temporary:
            pd.DataFrame(columns).to_csv(temporary, index=False, quoting=quoting)


def class_index(names: Sequence[str], negative_class: str | None) -> int | None:
    """Return the index of `--negative_class` among the class names, or None if it is not given.

    Raises:
        HistoError: no class has that name.
    """
    if negative_class is None:
        return None
    if negative_class not in names:
        raise HistoError(f"--negative_class is {negative_class!r}, expected the name of a class: {', '.join(names)}")
    return list(names).index(negative_class)


def harmless(text: str) -> str:
    """Escape text so that no spreadsheet or terminal interprets it; see `write_submission`."""
    is_formula = text.startswith(FORMULA) and not re.fullmatch(r"[+-]?\d+(\.\d*)?", text, re.ASCII)
    return printable(f"'{text}" if is_formula else text)


def _texts(path: Path, schema: pa.Schema, name: str) -> list[str] | None:
    """The list of strings in a file's metadata under `name`; None if it is missing."""
    try:
        values = json.loads((schema.metadata or {}).get(name.encode(), b"null"))
    except (ValueError, RecursionError):
        values = False
    if values is not None and not (isinstance(values, list) and set(map(type, values)) <= {str}):
        raise HistoError(f"{path}: its {name} are not a list of strings: pass a file made by Predictions.write")
    return values


def _table(path: Path) -> pa.Table:
    """Read a table after checking its size: a few bytes can encode billions of rows. Raises `HistoError`."""
    # Text as a dictionary: one long text may be repeated in all rows.
    found = pq.read_schema(path).names
    with pq.ParquetFile(path, read_dictionary=sorted({"id", "group"} & set(found))) as file:
        if missing := [name for name in COLUMNS if name not in found]:
            raise HistoError(
                f"{path} lacks the columns {missing} (it has {found}): pass a file made by Predictions.write"
            )
        if file.metadata.num_rows > MAX_ROWS:
            raise HistoError(f"{path}: {file.metadata.num_rows} rows, expected at most {MAX_ROWS}")
        batches, size = [], 0
        # Not by the size in a column's metadata: pyarrow 26 aborts the process if that is damaged.
        for batch in file.iter_batches(1024, columns=list(COLUMNS)):
            batches.append(batch)
            size += batch.nbytes
            if size > MAX_BYTES:
                raise HistoError(f"{path}: more than {MAX_BYTES} bytes of values, expected some for each image")
        table = pa.Table.from_batches(batches, file.schema_arrow.empty_table().select(COLUMNS).schema)
    table.validate(full=True)  # in a damaged file, dictionary indices may be invalid
    for name in ("id", "group"):
        if pa.types.is_dictionary(table[name].type):
            longest = max((pc.max(pc.binary_length(c.dictionary)).as_py() or 0 for c in table[name].chunks), default=0)
            if longest > MAX_NAME:
                raise HistoError(f"{path}: {name} has a text of {longest} bytes, expected at most {MAX_NAME}")
    return table


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    integers = np.asarray(values)
    if integers.ndim != 1 or (integers.size and integers.dtype.kind not in "iu"):
        raise HistoError(f"{name} have shape {integers.shape} and type {integers.dtype}, expected (n,) integers")
    return integers.astype(np.int64)


def _first(ids: pd.Series, n: int = 5) -> str:
    return ", ".join(ids[:n]) + (", ..." if len(ids) > n else "")
