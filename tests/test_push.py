"""Push and pull with the real client against a Hub on loopback, and against that Hub's failures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch
import xxhash
from hub_server import CUT, LOST, READ_TOKEN, TOKEN, Hub
from miniature import SIZE, config
from recipe_mains import main_of

from hf_histo import hub
from hf_histo.adapter.folder import verify
from hf_histo.data.load import load
from hf_histo.errors import HistoError
from hf_histo.evaluation.predictions import Predictions
from hf_histo.files import checksum
from hf_histo.finetune import run_config
from hf_histo.inference import Classifier
from hf_histo.training import trainer

NAME = "ana/tumor"
QUICK = ["--target_modules=last-conv", "--num_train_epochs=1"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(source: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    return run_config(config(run, *source, *QUICK), load(source[1])).adapter


@pytest.fixture
def adapter(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "adapter")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process's client asks, logged in, with an empty cache, and without waiting between attempts."""
    constants = huggingface_hub.constants
    with Hub(tmp_path / "hub") as started:
        monkeypatch.setattr(constants, "ENDPOINT", started.address)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", started.address)  # read when it was imported
        files = f"{started.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield started


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_the_hub(folder: Path, name: str = NAME) -> dict[str, bytes]:
    """Expected content on the Hub: the folder, with the repository's name in the card and no path of the backbone."""
    files = contents(folder)
    place = Path(json.loads(files["hf_histo.json"])["backbone"]["name"])
    for file in ("README.md", "hf_histo.json", "adapter_config.json"):
        assert str(place).encode() in files[file]
        files[file] = files[file].replace(str(place).encode(), place.name.encode())
    checksums = json.loads(files["checksums.json"])
    for file in checksums["files"]:
        checksums["files"][file] = xxhash.xxh3_128_hexdigest(files[file])
    files["checksums.json"] = json.dumps(checksums, indent=2).encode()
    return files | {"README.md": files["README.md"].replace(b"THIS_FOLDER", name.encode())}


def remeasure(folder: Path) -> None:
    """Change the folder's metrics, as another run would, by an additional line."""
    (folder / "metrics.json").write_bytes((folder / "metrics.json").read_bytes() + b"\n")
    checksums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
    checksums["files"]["metrics.json"] = checksum(folder / "metrics.json")
    (folder / "checksums.json").write_text(json.dumps(checksums), encoding="utf-8")


def refusal(adapter: Path, name: str = NAME, **options: bool | str) -> str:
    """Message of a failed push, which names the repository and the folder; the folder must be unchanged."""
    before = contents(adapter)
    with pytest.raises(HistoError) as caught:
        hub.push(adapter, name, **options)
    assert contents(adapter) == before
    message = str(caught.value)
    assert message.startswith(f"--hub_model_id {name}: ")
    assert f"hf_histo push --adapter {adapter} --hub_model_id {name}" in message
    assert "\n" not in message
    assert TOKEN not in message
    return message


def test_a_new_process_pulls_what_the_recipe_pushed(
    server: Hub,
    adapter: Path,
    source: tuple[Path, Path],
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push = f"push.py --adapter {adapter} --hub_model_id {NAME} --hub_private --hub_revision v2"
    monkeypatch.setattr(sys, "argv", push.split())
    main_of("push.py")()
    out, err = capsys.readouterr()
    assert out == f"uploaded: {server.address}/{NAME}\n"
    assert TOKEN not in err
    assert server.files(NAME, "v2") == on_the_hub(adapter)
    assert server.files(NAME) == {}
    assert server.is_private(NAME)

    pull = (
        "import sys; from hf_histo.data.load import load; from hf_histo.inference import Classifier\n"
        "data, name, local, backbone, output = sys.argv[1:]\n"
        "pulled = Classifier.from_pretrained(name, revision='v2', backbone=backbone)\n"
        "found = pulled, Classifier.from_pretrained(local)\n"
        "one, other = (classifier.predict(load(data)['val']) for classifier in found)\n"
        "one.assign(local=other['logit'])[['logit', 'local']].to_parquet(output)\n"
    )
    pulled = tmp_path / "pulled.parquet"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.address}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    arguments = [str(source[1]), NAME, str(adapter), str(source[0]), str(pulled)]
    subprocess.run([sys.executable, "-c", pull, *arguments], env=environment, cwd=ROOT, check=True)
    found = pd.read_parquet(pulled)
    assert np.ptp(found["logit"]) > 1e-3
    np.testing.assert_array_equal(found["logit"], found["local"])
    saved = Predictions.read(finished / "predictions" / "val.parquet").logits
    np.testing.assert_allclose(found["logit"], saved, rtol=0, atol=1e-5)


def test_without_a_network_the_cache_will_do(
    server: Hub, adapter: Path, source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(adapter, NAME)
    first = hub.fetch(NAME)
    asked = server.requests.total()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch(NAME) == first
    data = load(source[1])["val"]
    places = NAME, adapter
    found, wanted = (Classifier.from_pretrained(place, backbone=str(source[0])).predict(data) for place in places)
    np.testing.assert_array_equal(found["logit"], wanted["logit"])
    assert server.requests.total() == asked


@pytest.mark.figures
def test_no_path_of_this_machine_is_pushed(
    server: Hub, source: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    """No path of the data, the caches, the run, the backbone, or the initial adapter."""
    more = [*QUICK, f"--init_adapter={finished}", f"--cache_dir={tmp_path / 'converted'}"]
    whole = ["--num_train_epochs=1", "--method=full"]
    for method, options in {"lora": more, "full": whole}.items():
        result = run_config(config(tmp_path / "run" / method, *source, *options), load(source[1]))
        hub.push(result.adapter, f"ana/{method}")
        pushed = server.files(f"ana/{method}")
        assert len(pushed) > 10
        for place in (tmp_path.parent, source[0].parent.parent, Path.home()):
            assert [name for name, content in pushed.items() if f"{place}/".encode() in content] == []
    recorded = json.loads(server.files("ana/lora")["metrics.json"])["options"]
    assert recorded["init_adapter"] == "run/adapter"


def test_a_backbone_from_a_folder_is_called_by_its_name(
    server: Hub, adapter: Path, source: tuple[Path, Path], tmp_path: Path
) -> None:
    hub.push(adapter, NAME)
    with pytest.raises(HistoError, match="--backbone backbone: no such folder"):
        Classifier.from_pretrained(NAME)
    api = huggingface_hub.HfApi()
    api.create_repo("clinic/base")
    api.upload_folder(repo_id="clinic/base", folder_path=source[0])
    hub.push(adapter, NAME, base_model="clinic/base")
    assert huggingface_hub.ModelCard.load(hub.fetch(NAME) / "README.md").data.base_model == "clinic/base"
    data = load(source[1])["val"]
    found, wanted = (Classifier.from_pretrained(place).predict(data) for place in (NAME, adapter))
    np.testing.assert_array_equal(found["logit"], wanted["logit"])
    card = (hub.fetch(NAME) / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "Classifier" not in block]
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    image.save(tmp_path / "patch.png")
    names: dict[str, Any] = {"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}
    exec("\n".join(blocks).replace("patch.png", str(tmp_path / "patch.png")), names)
    probability = Classifier.from_pretrained(adapter)(image)["probability"][0]
    assert names["classify"](image) == [{"label": "tumor", "score": pytest.approx(probability, abs=1e-5)}]
    with pytest.raises(HistoError, match="known as clinic/base already"):
        hub.push(hub.fetch(NAME), NAME, base_model="clinic/other")


def test_nothing_but_the_files_of_a_run_is_pushed(server: Hub, adapter: Path, tmp_path: Path) -> None:
    """No other file, and none outside the folder that a link points to."""
    expected = on_the_hub(adapter)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (adapter / "id_rsa").symlink_to(secret)
    (adapter / "notes.txt").write_text("mine")
    (adapter / "more").symlink_to(tmp_path)
    hub.push(adapter, NAME)
    assert server.files(NAME) == expected
    for link in ("figures/more.png", "predictions/more.parquet"):
        (adapter / link).symlink_to(secret)
        with pytest.raises(HistoError, match="outside the folder"):
            hub.push(adapter, "ana/other")
        (adapter / link).unlink()
    (adapter / "README.md").unlink()
    (adapter / "README.md").symlink_to(secret)
    with pytest.raises(HistoError, match="outside the folder"):
        hub.push(adapter, "ana/other")


def test_what_was_pulled_is_verified_and_can_be_pushed_again(server: Hub, adapter: Path) -> None:
    hub.push(adapter, NAME)
    pulled = hub.fetch(NAME)
    assert verify(pulled) is not None
    hub.push(pulled, "ana/again")
    assert server.files("ana/again") == server.files(NAME)
    weights = (pulled / "adapter_model.safetensors").resolve()
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(HistoError, match="does not match its checksum"):
        hub.load(NAME)


def test_a_second_push_sends_nothing_again(server: Hub, adapter: Path) -> None:
    assert hub.push(adapter, NAME) == f"{server.address}/{NAME}"
    assert server.requests["PUT upload"] == 3  # the weights, and the predictions of two splits
    hub.push(adapter, NAME)
    assert server.requests["PUT upload"] == 3
    assert server.requests["POST commit"] == 1
    assert server.files(NAME) == on_the_hub(adapter)
    assert not server.is_private(NAME)


def test_a_pull_request_leaves_the_branch(server: Hub, adapter: Path) -> None:
    hub.push(adapter, NAME)
    remeasure(adapter)
    address = hub.push(adapter, NAME, pull_request=True)
    assert address == f"{server.address}/{NAME}/discussions/1"
    assert server.files(NAME, "refs/pr/1") == on_the_hub(adapter)
    assert server.files(NAME) != on_the_hub(adapter)
    assert contents(hub.fetch(NAME, "refs/pr/1")) == on_the_hub(adapter)


def test_other_files_of_the_repository_stay(server: Hub, adapter: Path) -> None:
    huggingface_hub.HfApi().create_repo(NAME)
    huggingface_hub.HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=NAME)
    (adapter / ".cache").write_bytes(b"not for the Hub")
    hub.push(adapter, NAME)
    (adapter / ".cache").unlink()
    assert server.files(NAME) == {"notes.txt": b"mine", **on_the_hub(adapter)}


@pytest.mark.parametrize("what", ["create", "validate", "preupload", "batch", "upload", "verify", "commit"])
@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "hf auth login"), (403, "may write"), (404, "check the name"), (500, "try again")]
)
def test_a_push_that_is_refused(server: Hub, adapter: Path, what: str, status: int, remedy: str) -> None:
    server.fail(what, status)
    message = refusal(adapter)
    assert remedy in message
    assert f"status {status}" in message
    assert "refused by order" in message
    server.heal()
    hub.push(adapter, NAME)
    assert server.files(NAME) == on_the_hub(adapter)


def test_a_push_that_collides(server: Hub, adapter: Path) -> None:
    hub.push(adapter, NAME)
    remeasure(adapter)
    server.fail("commit", 409)
    message = refusal(adapter)
    assert "status 409" in message
    assert "give the same command again" in message
    server.heal()
    hub.push(adapter, NAME)
    assert server.files(NAME) == on_the_hub(adapter)


@pytest.mark.parametrize("what", ["create", "batch", "upload", "commit"])
@pytest.mark.parametrize("how", [CUT, LOST])
def test_a_push_whose_connection_is_cut(server: Hub, adapter: Path, what: str, how: int) -> None:
    server.fail(what, how)
    assert "try again" in refusal(adapter)
    server.heal()
    before = server.requests["PUT upload"]
    hub.push(adapter, NAME)
    assert server.files(NAME) == on_the_hub(adapter)
    if (what, how) == ("upload", LOST) or what == "commit":
        assert server.requests["PUT upload"] - before < 3  # what had arrived was not sent again


@pytest.mark.parametrize("status", [403, 404])
def test_a_push_through_xet_that_is_refused(
    server: Hub, adapter: Path, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If hf_xet is installed, the client uploads large files with it, and requests a token for that."""
    pytest.importorskip("hf_xet")
    server.fail("xet", status)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
        message = refusal(adapter)
    assert server.requests["GET xet"] and not server.requests["POST batch"]
    assert str(status) in message
    assert "HF_HUB_DISABLE_XET=1" in message
    hub.push(adapter, NAME)
    assert server.files(NAME) == on_the_hub(adapter)


def test_a_fault_that_passes_is_not_reported(server: Hub, adapter: Path) -> None:
    server.fail("upload", 500, times=2)
    server.fail("batch", CUT, times=1)
    hub.push(adapter, NAME)
    assert server.files(NAME) == on_the_hub(adapter)


def test_a_server_that_repeats_the_token(server: Hub, adapter: Path) -> None:
    server.fail("commit", 403, message=f"Bearer {TOKEN} may not")
    assert "Bearer *** may not" in refusal(adapter)


def test_the_hub_reads_the_card(server: Hub, adapter: Path) -> None:
    """By its own check of the metadata (here that of the loopback server), and the client's."""
    hub.push(adapter, NAME)
    (metadata,) = server.cards
    assert huggingface_hub.ModelCard.load(adapter / "README.md").data.to_dict()["license"] == "unknown"
    assert metadata["model-index"][0]["results"][0]["dataset"]["split"] == "val"
    assert metadata["license"] == "unknown"


def test_a_card_that_the_hub_refuses(server: Hub, adapter: Path) -> None:
    card = (adapter / "README.md").read_text(encoding="utf-8")
    (adapter / "README.md").write_text(card.replace("pipeline_tag: image-classification", "pipeline_tag: [1]"))
    assert "pipeline_tag is [1]" in refusal(adapter)


def test_the_command_that_resumes_makes_the_same_push(server: Hub, adapter: Path) -> None:
    server.fail("create", 500)
    options = "--hub_private --hub_revision v2 --hub_base_model clinic/base"
    assert f"{options} resumes it" in refusal(adapter, private=True, revision="v2", base_model="clinic/base")


def test_a_folder_of_no_adapter(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(HistoError, match=r"holds no hf_histo\.json"):
        hub.push(tmp_path, NAME)
    assert not server.requests


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "hf auth login"), (403, "may write"), (404, "check the name"), (500, "try again"), (CUT, "try again")],
)
def test_a_pull_that_fails(server: Hub, adapter: Path, status: int, remedy: str) -> None:
    hub.push(adapter, NAME)
    server.fail("resolve", status)
    with pytest.raises(HistoError, match=f"adapter {NAME}: ") as caught:
        Classifier.from_pretrained(NAME)
    assert remedy in str(caught.value)
    assert TOKEN not in str(caught.value)
    server.heal()
    assert contents(hub.fetch(NAME)) == on_the_hub(adapter)


def test_a_private_repository_of_somebody_else_and_an_unknown_branch(
    server: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(adapter, NAME, private=True)
    with pytest.raises(HistoError, match=r"status 404.*check the name, the branch"):
        hub.fetch(NAME, "nowhere")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(HistoError, match=r"status 401.*hf auth login"):
        hub.fetch(NAME)


def test_what_was_half_pulled_is_no_adapter_without_a_network(
    server: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.push(adapter, NAME)
    server.fail("resolve", 500, times=1)
    with pytest.raises(HistoError):
        hub.fetch(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HistoError, match=NAME):
        Classifier.from_pretrained(NAME)


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("ana/tumor", TOKEN, None),
        ("clinic/tumor", TOKEN, None),
        ("other/tumor", TOKEN, "expected a repository of ana or clinic"),
        ("ana/tumor", READ_TOKEN, "may only read"),
        ("ana/tumor", "hf_unknown", "status 401.*hf auth login"),
        ("ana/tumor", None, "hf auth login"),
        ("ana/a b", TOKEN, "--hub_model_id ana/a b"),
    ],
)
def test_credentials(
    server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, token: str | None, expected: str | None
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if expected is None:
        return hub.check_access(name)
    with pytest.raises(HistoError, match=expected) as caught:
        hub.check_access(name)
    assert (token or TOKEN) not in str(caught.value)
    if token == TOKEN and name == "other/tumor":
        hub.check_access(name, pull_request=True)


def test_a_run_asks_before_it_trains_and_pushes_after(
    server: Hub, source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    options = ["--push_to_hub", f"--hub_model_id={NAME}"]
    server.fail("whoami", 401)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build", lambda *args, **kwargs: pytest.fail("trained"))
        with pytest.raises(HistoError, match=r"status 401.*hf auth login"):
            run_config(config(tmp_path / "run", *source, *QUICK, *options), load(source[1]))
    assert not (tmp_path / "run").exists()
    server.heal()

    # A finished run is pushed by the same command; what fails then costs nothing.
    shutil.copytree(finished.parent, tmp_path / "run")
    server.fail("commit", 500)
    with pytest.raises(HistoError, match="hf_histo push"):
        run_config(config(tmp_path / "run", *source, *QUICK, *options), load(source[1]))
    server.heal()
    result = run_config(config(tmp_path / "run", *source, *QUICK, *options), load(source[1]))
    assert result.address == f"{server.address}/{NAME}"
    assert f"uploaded: {result.address}" in result.summary()
    assert server.files(NAME) == on_the_hub(result.adapter)


def test_only_the_main_process_pushes(
    server: Hub, source: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    shutil.copytree(finished.parent, tmp_path / "run")
    monkeypatch.setattr("accelerate.PartialState.is_main_process", property(lambda state: False))
    options = config(tmp_path / "run", *source, *QUICK, "--push_to_hub", f"--hub_model_id={NAME}")
    assert run_config(options, load(source[1])).address is None
    assert not server.requests


def test_offline_mode_is_named_in_the_message(adapter: Path) -> None:
    assert "HF_HUB_OFFLINE" in refusal(adapter, "nobody/nothing")
