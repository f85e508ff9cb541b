"""Train for an hour and check that the memory of the process and its workers does not grow.

    python tests/support/soak.py --minutes 60 --output soak.csv
    python tests/support/soak.py --minutes 60 --output soak.csv --method linear --training_views 4 --cache_features on

The recipe trains the built-in backbone on the built-in data with augmentation and two workers, evaluates and writes a
checkpoint after each pass, and is sent SIGTERM when the time is up. Other options go to the recipe. Memory is what no
file backs (a mapped table can be given back at any time), each page counted once, however many processes share it.

It passes if a line through the last three quarters grows by less than `BOUND`, in the tree of processes and in the
first one alone. Needs Linux.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from recipe_mains import RECIPES

RECIPE = RECIPES / "histo_lora.py"
OPTIONS = ["--num_workers=2", "--num_train_epochs=100000", "--early_stopping_patience=0", "--logging_steps=100"]
BOUND = 48  # MiB over three quarters of the time: at an hour, some kilobytes for each update
EVERY = 5.0  # seconds


def memory(process: psutil.Process) -> int:
    """Bytes of a process that no file backs, pages that n processes share counted as 1/n; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))


def watch(started: subprocess.Popen[bytes], every: float = EVERY) -> Iterator[tuple[float, int, int, int]]:
    """While a process runs: seconds since the start, bytes of it and of its whole tree, and number of processes."""
    first, begin = psutil.Process(started.pid), time.monotonic()
    while started.poll() is None:
        try:
            children = first.children(recursive=True)
        except psutil.NoSuchProcess:
            return
        own = memory(first)
        yield time.monotonic() - begin, own, own + sum(map(memory, children)), 1 + len(children)
        time.sleep(every)


def growth(seconds: pd.Series, values: pd.Series) -> float:
    """How much a line through the last three quarters of the time rises, in the unit of the values."""
    late = seconds >= seconds.iloc[-1] / 4
    slope, _ = np.polyfit(seconds[late], values[late], 1)
    return float(slope * 0.75 * seconds.iloc[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to train")
    parser.add_argument("--output", type=Path, help="CSV of the samples")
    own, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPE), *OPTIONS, f"--output_dir={folder}/run", *more]
        started = subprocess.Popen(command)
        samples = []
        for sample in watch(started):
            samples.append(sample)
            if sample[0] > 60 * own.minutes:
                started.terminate()
                break
        code = started.wait()
        checkpoints = sorted(int(path.name.split("-")[1]) for path in Path(folder).glob("run/checkpoint-*"))
    table = pd.DataFrame(samples, columns=["seconds", "first", "tree", "processes"])
    table[["first", "tree"]] /= 2**20
    if own.output:
        table.to_csv(own.output, index=False, float_format="%.2f")
    late = table[table["seconds"] >= table["seconds"].iloc[-1] / 4]
    print(
        f"{table['seconds'].iloc[-1] / 60:.1f} minutes, {checkpoints[-1:]} updates, {len(table)} samples, exit {code}"
    )
    passed = code == 128 + 15
    for name in ("first", "tree"):
        rise = growth(table["seconds"], table[name])
        passed &= rise < BOUND
        usual, most = late[name].median(), late[name].max()
        print(f"{name}: {rise:+.1f} MiB over three quarters of the time; median {usual:.0f}, most {most:.0f}")
    sys.exit(0 if passed else f"expected less than {BOUND} MiB, and exit 143")


if __name__ == "__main__":
    main()
