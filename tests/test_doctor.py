"""The report about this machine."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_histo import doctor as module
from hf_histo.config.commands import DoctorOptions
from hf_histo.doctor import doctor
from hf_histo.errors import HistoError


def lines(**options: str) -> dict[str, str]:
    report = doctor(DoctorOptions(**options))  # type: ignore[arg-type]
    return {line.split("  ")[0]: line for line in report.splitlines()}


def test_what_is_here_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
    found = lines(cache_dir=str(tmp_path))
    assert metadata.version("torch") in found["torch"]
    assert found["converted data"].endswith(f"GiB free for {tmp_path}")
    assert "hf_secret" not in "".join(found.values()) and found["Hub"].endswith("a token is stored")
    assert "[app]" in found and "[test]" in found


def test_what_is_missing_comes_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = module._version
    monkeypatch.setattr(module, "_version", lambda name: None if name == "optuna" else version(name))
    monkeypatch.setattr(module, "get_token", lambda: None)
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    found = lines(cache_dir=str(tmp_path / "new" / "folder"))
    assert found["[sweep]"].endswith('without optuna  ->  pip install "hf_histo[sweep]"')
    assert found["Hub"].endswith("->  hf auth login")
    assert "1 GiB free" in found["converted data"] and "->  make room" in found["converted data"]


def test_each_place_that_is_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = lines()
    assert found["backbones"].endswith(f"GiB free for {tmp_path / 'hub'}")
    assert found["runs"].endswith(f"GiB free for {tmp_path / 'runs'}")


def test_a_gpu_that_torch_can_not_use_comes_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.accelerator, "is_available", lambda: False)
    for tool, expected in {"/usr/bin/nvidia-smi": "->  nvidia-smi for the driver", None: "none"}.items():
        monkeypatch.setattr(shutil, "which", lambda name, tool=tool: tool)
        assert expected in lines()["GPU"]


def test_the_precisions_of_each_device_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="H200", total_memory=140 * 2**30)
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(module.torch.cuda, "get_device_properties", lambda number: device)
    monkeypatch.setattr(module.torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(module.launch, "cpu_has_bf16", lambda: True)
    found = lines()
    assert found["GPU 0"].endswith("H200, 140 GiB; float32, bf16")
    assert found["CPU"].endswith("float32, bf16 (--mixed_precision bf16)")


def test_a_required_package_that_is_too_old_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = module._version
    monkeypatch.setattr(module, "_version", lambda name: "0.1" if name == "peft" else version(name))
    with pytest.raises(HistoError, match=r'peft: 0\.1, expected >=.*; pip install "peft>='):
        doctor(DoctorOptions())
    assert "torch" in capsys.readouterr().out
