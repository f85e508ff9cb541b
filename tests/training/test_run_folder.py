"""The folder of a run: the same command resumes, another one is refused."""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hf_histo import launch
from hf_histo.config import Config, parse
from hf_histo.errors import HistoError
from hf_histo.files import write_checksums
from hf_histo.training import run_folder
from hf_histo.training.run_folder import Run


def config(folder: Path, *more: str) -> Config:
    return parse(None, [f"--output_dir={folder}", *more])


def begin(options: Config, data: str = "") -> Path:
    run = Run.of(options, data)
    run_folder.begin(run)
    return run.folder


def checkpoint(options: Config, data: str = "") -> str | None:
    return run_folder.checkpoint(Run.of(options, data), options.training.resume_from_checkpoint)


def refusal(folder: Path, *more: str) -> str:
    with pytest.raises(HistoError) as caught:
        begin(config(folder, *more))
    message = str(caught.value)
    assert message.startswith(f"--output_dir {folder}: ")
    assert "\n" not in message
    return message


def complete_checkpoint(folder: Path, step: int, options: Config | None = None) -> Path:
    """Write a complete checkpoint, as with `CheckpointRecord`."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in ("trainer_state.json", "optimizer.pt"):
        (path / name).write_text("{}", encoding="utf-8")
    write_checksums(path, run=Run.of(options or config(folder)).identity)
    return path


def test_the_options_are_recorded(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run", "--lora_rank=4"))
    assert folder == tmp_path / "run"
    assert yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["lora_rank"] == 4
    assert parse(None, ["--config", str(folder / "run.yaml")]) == config(folder, "--lora_rank=4")


def test_the_same_command_resumes(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    kept = complete_checkpoint(folder, 3)
    assert begin(config(folder)) == folder
    assert kept.exists()
    assert begin(config(folder, "--num_workers=3", "--per_device_eval_batch_size=7")) == folder


def test_a_run_from_before_an_option_existed_resumes_with_its_default(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    record = folder / run_folder.RECORD
    record.write_text("".join(line for line in record.read_text().splitlines(True) if not line.startswith("head:")))
    assert begin(config(folder)) == folder
    assert "head 'linear' (now 'mlp')" in refusal(folder, "--head=mlp")


def test_its_checkpoints_are_resumed_too(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    recorded = Run.of(config(folder)).identity
    kept = complete_checkpoint(folder, 3)
    write_checksums(kept, run={key: value for key, value in recorded.items() if key != "label_smoothing"})
    assert checkpoint(config(folder)) == str(kept)
    assert checkpoint(config(folder, "--label_smoothing=0.1")) is None
    write_checksums(kept)
    assert checkpoint(config(folder)) is None


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    message = refusal(folder, "--lora_rank=4", "--learning_rate=0.5")
    assert "lora_rank 8 (now 4)" in message
    assert "learning_rate 0.001 (now 0.5)" in message
    assert "--overwrite_output_dir" in message
    assert "seed" not in message


def test_other_files_are_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "other files" in refusal(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    assert not (tmp_path / "run.yaml").exists()


@pytest.mark.parametrize("content", ["", "- a\n", "seed: [", "text"])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content, encoding="utf-8")
    assert "--overwrite_output_dir" in refusal(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    refusal(tmp_path / "run")


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    (folder / "adapter").mkdir()
    complete_checkpoint(folder, 3)
    for name in ("images/train/a.png", "thesis.tex", "checkpoint-best/weights.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    begin(config(folder, "--lora_rank=4", "--overwrite_output_dir"))
    kept = ["checkpoint-best", "data.txt", "images", "run.yaml", "thesis.tex"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    assert (folder / "images" / "train" / "a.png").exists()
    assert begin(config(folder, "--lora_rank=4")) == folder  # the switch itself is not part of the run


def test_overwriting_keeps_an_unfinished_run_of_the_same_command(tmp_path: Path) -> None:
    """A job that is queued again must resume, rather than start over each time."""
    again = config(tmp_path / "run", "--overwrite_output_dir")
    folder = begin(again)
    kept = complete_checkpoint(folder, 3)
    assert begin(again) == folder
    assert checkpoint(again) == str(kept)
    (folder / "adapter").mkdir()
    assert checkpoint(again) is None
    begin(again)
    assert not kept.exists()
    assert not (folder / "adapter").exists()


def test_overwriting_refuses_to_delete_what_it_reads(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    data = folder / "figures" / "images"
    data.mkdir(parents=True)
    other = config(folder, "--lora_rank=4", "--overwrite_output_dir", f"--data={data}")
    with pytest.raises(HistoError, match=r"figures/images, which this run reads"):
        begin(other)
    assert data.exists()


def test_a_file_of_options_can_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("overwrite_output_dir: true\n")
    with pytest.raises(HistoError, match="give it on the command line"):
        parse(None, ["--config", str(tmp_path / "options.yaml")])
    folder = begin(config(tmp_path / "run", "--overwrite_output_dir"))
    assert not parse(None, ["--config", str(folder / run_folder.RECORD)]).output.overwrite_output_dir


def test_a_check_claims_nothing(tmp_path: Path) -> None:
    run_folder.check(Run.of(config(tmp_path / "run")))
    assert list(tmp_path.iterdir()) == []


def test_the_empty_folder_that_one_is_in_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with run_folder.alone_in(Path()):
        assert begin(config(Path())) == Path()
    assert (tmp_path / "run" / "run.yaml").is_file()


def test_a_link_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    assert f"a link to {tmp_path / 'elsewhere'}" in refusal(tmp_path / "run")


def test_a_folder_of_data_is_no_place_for_a_run(tmp_path: Path) -> None:
    """Among folders of images it would be another class. An existing run there resumes."""
    (tmp_path / "data").mkdir()
    folder = tmp_path / "data" / "run"
    assert "lies in --data" in refusal(folder, f"--data={tmp_path / 'data'}")
    begin(config(folder))
    assert begin(config(folder, f"--data={tmp_path / 'data'}", "--overwrite_output_dir")) == folder


def test_a_folder_that_vanished_is_an_error(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    run_folder.require_begun(folder)
    (folder / "run.yaml").unlink()
    with pytest.raises(HistoError, match="deleted or moved"):
        run_folder.require_begun(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "/dev/shm/x"), OSError(28, "No space left")])
def test_a_full_device_is_not_taken_for_the_disk_of_the_run(tmp_path: Path, error: OSError) -> None:
    with pytest.raises(HistoError) as caught, run_folder.system_failures(tmp_path):
        raise error
    assert "the disk is full" not in str(caught.value)
    assert str(error.filename or "--cache_dir") in str(caught.value)


def test_a_full_disk_is_reported_whatever_the_library_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage._replace(free=2**23))
    with pytest.raises(HistoError, match=r"the disk is full \(8\.0 MiB left\)"), run_folder.system_failures(tmp_path):
        raise RuntimeError("writing failed")
    monkeypatch.undo()
    with (
        pytest.raises(HistoError, match=r"the disk is full \(0\.0 MiB left\)"),
        run_folder.system_failures(tmp_path / "vanished"),
    ):
        raise OSError(28, "No space left on device")


def test_a_killed_reader_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=r"lower --num_workers"), run_folder.system_failures(tmp_path):
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="else"), run_folder.system_failures(tmp_path):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("given", "resumes"),
    [
        (["--overwrite_output_dir", "--seed=1"], ["--seed=1"]),
        (["--overwrite_output_dir", "True"], []),
        (["--a", "b", "--overwrite-output-dir=1"], ["--a", "b"]),
        (["--data", "a b"], ["--data", "a b"]),
    ],
)
def test_the_command_that_resumes_does_not_overwrite(tmp_path: Path, given: list[str], resumes: list[str]) -> None:
    script = tmp_path / "recipe.py"
    script.write_text("from hf_histo.launch import command\nprint(command())\n")
    shown = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, check=True).stdout
    assert shlex.split(shown) == [sys.executable, str(script), *resumes]


def test_overwriting_never_deletes_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "other files" in refusal(tmp_path, "--overwrite_output_dir")
    assert (tmp_path / "thesis.tex").exists()


def test_a_run_is_finished_once_its_adapter_is_there(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    assert not run_folder.is_finished(folder)
    (folder / ".adapter.x.incomplete").mkdir()
    assert not run_folder.is_finished(folder)
    (folder / "adapter").mkdir()
    assert run_folder.is_finished(folder)


def truncate(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text('{"epoch":', encoding="utf-8")


def remove_optimizer(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


def remove_list(checkpoint: Path) -> None:
    (checkpoint / "checksums.json").unlink()


@pytest.mark.parametrize("damage", [truncate, remove_optimizer, remove_list])
def test_the_last_complete_checkpoint_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = begin(config(tmp_path / "run"))
    assert checkpoint(config(folder)) is None
    for step in (9, 10, 100):
        complete_checkpoint(folder, step)
    for name in ("checkpoint-best", "checkpoint-"):
        (folder / name).mkdir()
    assert checkpoint(config(folder)) == str(folder / "checkpoint-100")
    assert checkpoint(config(folder, "--resume_from_checkpoint=last")) == str(folder / "checkpoint-100")
    damage(folder / "checkpoint-100")
    with caplog.at_level(logging.WARNING):
        assert checkpoint(config(folder)) == str(folder / "checkpoint-10")
    assert f"{folder / 'checkpoint-100'} is not used" in caplog.text


def test_a_checkpoint_that_is_asked_for_must_be_complete(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    asked = complete_checkpoint(tmp_path, 5)
    assert checkpoint(config(folder, f"--resume_from_checkpoint={asked}")) == str(asked)
    for missing in (str(tmp_path / "checkpoint-6"), "last"):
        with pytest.raises(HistoError, match=r"^--resume_from_checkpoint .* no complete checkpoint"):
            checkpoint(config(folder, f"--resume_from_checkpoint={missing}"))
    truncate(asked)
    with pytest.raises(HistoError, match=r"damaged checkpoint \(trainer_state\.json"):
        checkpoint(config(folder, f"--resume_from_checkpoint={asked}"))


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = begin(config(tmp_path / "run"))
    other = complete_checkpoint(tmp_path, 5, config(folder, "--lora_rank=4"))
    with pytest.raises(HistoError, match=r"is of another run: lora_rank 4 there and 8 here"):
        checkpoint(config(folder, f"--resume_from_checkpoint={other}"))
    write_checksums(other)
    with pytest.raises(HistoError, match=r"is of another run: "):
        checkpoint(config(folder, f"--resume_from_checkpoint={other}"))
    own = complete_checkpoint(tmp_path, 6)
    with pytest.raises(HistoError, match=r"data fingerprint '' there and 'other images' here"):
        checkpoint(config(folder, f"--resume_from_checkpoint={own}"), "other images")


def test_the_default_folder_names_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given = parse(None, ["--data", "camelyon", "--backbone", "facebook/dinov2-small", "--seed", "3"])
    assert run_folder.folder_of(given) == Path("runs/camelyon-dinov2-small-lora-seed3")


def test_other_data_is_another_run(tmp_path: Path) -> None:
    options = parse(None, [f"--output_dir={tmp_path / 'run'}"])
    begin(options, "one")
    begin(options, "one")
    with pytest.raises(HistoError, match=r"other data .*fingerprint one, now two.*--overwrite_output_dir"):
        begin(options, "two")


def test_what_a_killed_process_left_unfinished_is_no_run_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    left = folder / ".run.yaml.x.incomplete"
    left.parent.mkdir(parents=True)
    left.touch()
    assert begin(config(folder)) == folder
    assert not left.exists()


def test_folders_above_a_run_are_made(tmp_path: Path) -> None:
    assert (begin(config(tmp_path / "runs" / "today" / "run")) / run_folder.RECORD).is_file()


def test_two_launches_are_not_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with run_folder.alone_in(folder):
        with (
            pytest.raises(HistoError, match=f"{folder}: another process is training there"),
            run_folder.alone_in(folder),
        ):
            pass
        with run_folder.alone_in(tmp_path / "runs" / "other"):
            pass
    with run_folder.alone_in(folder):
        pass


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output_dir": "other"}, "output_dir 'other' in process 1 and 'FOLDER' in process 0"),
        ({"data fingerprint": "x"}, "data fingerprint 'x' in process 1 and '' in process 0"),
        ({"lora_rank": 4, "mixed_precision": "bf16"}, "lora_rank 4 in process 1 and 8 in process 0, mixed_precision"),
    ],
)
def test_processes_of_a_launch_that_differ_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], message: str
) -> None:
    run = Run.of(config(tmp_path / "run", "--mixed_precision=no"))
    monkeypatch.setattr(launch, "process_count", lambda: 2)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, *own])
    run_folder.require_agreement(run)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, own[0] | changed])
    with pytest.raises(HistoError, match="the 2 processes of this launch differ") as caught:
        run_folder.require_agreement(run)
    assert message.replace("FOLDER", str(run.folder)) in str(caught.value)
