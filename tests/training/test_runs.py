"""The folder of a run: the same command goes on, another one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hf_histo.config import Config, parse
from hf_histo.errors import HistoError
from hf_histo.training import runs


def config(folder: Path, *more: str) -> Config:
    return parse(None, [f"--output_dir={folder}", *more])


def refusal(folder: Path, *more: str) -> str:
    with pytest.raises(HistoError) as caught:
        runs.begin(config(folder, *more))
    message = str(caught.value)
    assert message.startswith(f"--output_dir {folder}: ")
    assert "\n" not in message
    return message


def complete_checkpoint(folder: Path, step: int, content: str = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "trainer_state.json").write_text(content, encoding="utf-8")
    return path


def test_the_options_are_recorded(tmp_path: Path) -> None:
    folder = runs.begin(config(tmp_path / "run", "--lora_rank=4"))
    assert folder == tmp_path / "run"
    assert yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["lora_rank"] == 4
    assert parse(None, ["--config", str(folder / "run.yaml")]) == config(folder, "--lora_rank=4")


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = runs.begin(config(tmp_path / "run"))
    kept = complete_checkpoint(folder, 3)
    assert runs.begin(config(folder)) == folder
    assert kept.exists()
    assert runs.begin(config(folder, "--num_workers=3", "--per_device_eval_batch_size=7")) == folder


def test_a_run_from_before_an_option_existed_goes_on_with_its_default(tmp_path: Path) -> None:
    folder = runs.begin(config(tmp_path / "run"))
    record = folder / runs.RECORD
    record.write_text("".join(line for line in record.read_text().splitlines(True) if not line.startswith("head:")))
    assert runs.begin(config(folder)) == folder
    assert "head 'linear' (now 'mlp')" in refusal(folder, "--head=mlp")


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    folder = runs.begin(config(tmp_path / "run"))
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


def test_overwriting_deletes_an_earlier_run(tmp_path: Path) -> None:
    folder = runs.begin(config(tmp_path / "run"))
    (folder / "adapter").mkdir()
    complete_checkpoint(folder, 3)
    runs.begin(config(folder, "--lora_rank=4", "--overwrite_output_dir"))
    assert sorted(path.name for path in folder.iterdir()) == ["data.txt", "run.yaml"]
    assert runs.begin(config(folder, "--lora_rank=4")) == folder  # the switch itself is not part of the run


def test_overwriting_never_deletes_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "other files" in refusal(tmp_path, "--overwrite_output_dir")
    assert (tmp_path / "thesis.tex").exists()


def test_a_run_is_finished_once_its_adapter_is_there(tmp_path: Path) -> None:
    folder = runs.begin(config(tmp_path / "run"))
    assert not runs.is_finished(folder)
    (folder / ".adapter.x.incomplete").mkdir()
    assert not runs.is_finished(folder)
    (folder / "adapter").mkdir()
    assert runs.is_finished(folder)


def test_the_last_complete_checkpoint_is_taken(tmp_path: Path) -> None:
    folder = runs.begin(config(tmp_path / "run"))
    assert runs.checkpoint(config(folder), folder) is None
    for step in (9, 10, 100):
        complete_checkpoint(folder, step)
    assert runs.checkpoint(config(folder), folder) == str(folder / "checkpoint-100")
    (folder / "checkpoint-100" / "trainer_state.json").write_text('{"epoch":', encoding="utf-8")
    (folder / "checkpoint-200").mkdir()
    assert runs.checkpoint(config(folder), folder) == str(folder / "checkpoint-10")


def test_a_checkpoint_that_is_asked_for_must_be_complete(tmp_path: Path) -> None:
    folder = runs.begin(config(tmp_path / "run"))
    asked = complete_checkpoint(tmp_path, 5)
    assert runs.checkpoint(config(folder, f"--resume_from_checkpoint={asked}"), folder) == str(asked)
    for missing in (str(tmp_path / "checkpoint-6"), "last"):
        with pytest.raises(HistoError, match=r"^--resume_from_checkpoint .* no complete checkpoint"):
            runs.checkpoint(config(folder, f"--resume_from_checkpoint={missing}"), folder)


def test_the_default_folder_names_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given = parse(None, ["--data", "camelyon", "--backbone", "facebook/dinov2-small", "--seed", "3"])
    assert runs.folder_of(given) == Path("runs/camelyon-dinov2-small-lora-seed3")


def test_other_data_is_another_run(tmp_path: Path) -> None:
    options = parse(None, [f"--output_dir={tmp_path / 'run'}"])
    runs.begin(options, "one")
    runs.begin(options, "one")
    with pytest.raises(HistoError, match=r"other data .*fingerprint one, now two.*--overwrite_output_dir"):
        runs.begin(options, "two")


def test_two_launches_are_not_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with runs.alone_in(folder):
        with pytest.raises(HistoError, match=f"{folder}: another process is training there"), runs.alone_in(folder):
            pass
        with runs.alone_in(tmp_path / "runs" / "other"):
            pass
    with runs.alone_in(folder):
        pass
