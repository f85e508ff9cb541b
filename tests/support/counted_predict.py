"""`hf_histo` whose predictions take at least `SECONDS`, and append process and slide to the file that LOG names."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import datasets

from hf_histo.cli import main
from hf_histo.inference import Classifier

SECONDS = 0.5
predict = Classifier.predict


def counted(self: Classifier, dataset: datasets.Dataset, **options: Any) -> Any:
    with Path(os.environ["LOG"]).open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {dataset['group'][0]}\n")
    time.sleep(SECONDS)
    return predict(self, dataset, **options)


if __name__ == "__main__":
    Classifier.predict = counted  # type: ignore[method-assign]
    main()
