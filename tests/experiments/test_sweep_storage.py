"""A sweep whose study is in a database: a real PostgreSQL, started here."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from miniature import SIZE, write_backbone, write_data

from hf_histo.config import parse_with
from hf_histo.config.experiments import SweepOptions
from hf_histo.errors import HistoError

optuna = pytest.importorskip("optuna")
sweep = pytest.importorskip("hf_histo.experiments.sweep")

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an empty database. The server refuses to run as root, so that `postgres` runs it there."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    found = str(PROGRAMS[-1]) if PROGRAMS else shutil.which("postgres")
    if not found:
        pytest.skip("PostgreSQL is not installed")
    bin = Path(found).parent
    folder = tmp_path_factory.mktemp("postgresql")
    as_user: list[str] = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("PostgreSQL does not run as root, and there is no setpriv to change the user")
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
        for parent in folder.parents[:3]:  # pytest's folders are the user's alone
            if parent != Path("/tmp"):
                parent.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    data = str(folder / "data")
    initdb = [str(bin / "initdb"), "-D", data, "-U", "histo", "--auth=trust", "--no-sync"]
    subprocess.run([*as_user, *initdb], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    options = ["-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*as_user, str(bin / "postgres"), *options], cwd=folder, stderr=log)
    try:
        ready = [str(bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, check=False).returncode:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"postgresql+psycopg2://histo@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGQUIT)  # at once
        process.wait(60)


def test_a_study_in_postgresql_resumes(server: str, tmp_path: Path) -> None:
    data, backbone = write_data(tmp_path / "mini"), write_backbone(tmp_path / "model")
    (tmp_path / "study.yaml").write_text("grid: {learning_rate: [1.0e-2, 1.0e-4]}")
    out = tmp_path / "out"
    quick = f"--image_size={SIZE} --resize_size={SIZE} --num_train_epochs=1 --method=linear"
    places = [f"--data={data}", f"--backbone={backbone}", f"--study={tmp_path / 'study.yaml'}", f"--storage={server}"]

    for _ in range(2):  # nothing is left for the second
        sweep.sweep(*parse_with(SweepOptions, None, [*quick.split(), *places, f"--output_dir={out}"]))
    study = optuna.load_study(study_name=str(out.resolve()), storage=server)
    assert [trial.state for trial in study.trials] == [optuna.trial.TrialState.COMPLETE] * 2
    assert not (out / "study.db").exists()
    assert (out / "sweep.md").read_text().count("| complete |") == 2
    assert server not in (out / "sweep.json").read_text()


@pytest.mark.parametrize(
    "url",
    ["nothing://host/name", "sqlite:////nowhere/at/all.db", "postgresql+psycopg2://me:secret@127.0.0.1:1/name", "x"],
)
def test_a_database_that_can_not_be_opened_is_one_line(url: str) -> None:
    with pytest.raises(HistoError, match="--storage: the database can't be opened") as error:
        sweep.open_storage(url)
    assert "secret" not in str(error.value)
