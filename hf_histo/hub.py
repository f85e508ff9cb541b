"""Download and upload of adapter folders on the Hugging Face Hub, with its errors reported in one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from hf_histo.adapter import ensemble
from hf_histo.adapter import folder as adapter_folder
from hf_histo.adapter.files import CARD, SIDECAR, files_of, hashed
from hf_histo.adapter.folder import verify
from hf_histo.adapter.model_card import HERE
from hf_histo.adapter.sidecar import Sidecar
from hf_histo.errors import HistoError
from hf_histo.files import CHECKSUMS, checksums

# Exceptions of the Hub's client; an upload that fails in one of its threads raises RuntimeError.
FAILURES = (HTTPError, OSError, ValueError, RuntimeError)
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may do this"
REMEDIES: dict[int | type[BaseException], str] = {
    LocalTokenNotFoundError: _LOG_IN,
    ConnectionError: "try again; HF_HUB_DISABLE_XET=1 sends it without hf_xet",  # hf_xet raises this type
    HFValidationError: "give a folder that exists, or owner/name",
    400: "correct what it names",
    401: _LOG_IN,
    403: "use a token that may write there",
    404: "check the name, the branch and, where it is private, the token",
    409: "somebody else changes it at the same time: give the same command again",
    429: "too many requests: wait a while",
}


def fetch(source: str | Path, revision: str | None = None) -> Path:
    """Local folder of an adapter: `source` itself, or its snapshot from the Hub in the cache.

    Without a network, a cached snapshot is used. Raises `HistoError` if neither is available, and for a revision of a
    local folder.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise HistoError(f"--revision is {revision!r}, which acts only on an adapter from the Hub; leave it out")
        return folder
    try:
        return Path(snapshot_download(str(source), revision=revision))
    except FAILURES as error:
        raise HistoError(f"adapter {source}: no such folder, and the Hub gave none: {_reason(error)}") from None


def load(source: str | Path, *, revision: str | None = None, backbone: str | None = None) -> tuple[nn.Module, Sidecar]:
    """Load model and sidecar from an adapter folder or a Hub name; see `fetch` and `hf_histo.adapter.folder.load`."""
    return adapter_folder.load(fetch(source, revision), backbone=backbone)


def check_access(repository: str, *, pull_request: bool = False) -> None:
    """Check, before training, that the token may write to `repository` (owner/name).

    Raises `HistoError` without a network or a token, for a token that may only read, and, unless for a pull request,
    for a repository that belongs neither to the token's owner nor to one of the owner's organizations.
    """
    try:
        validate_repo_id(repository)
        account = HfApi().whoami()
    except FAILURES as error:
        raise HistoError(f"--hub_model_id {repository}: the Hub can't be written to: {_reason(error)}") from None
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HistoError(f"--hub_model_id {repository}: {account['name']}'s token may only read; {REMEDIES[403]}")
    owners = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    if repository.split("/")[0] not in owners and not pull_request:
        raise HistoError(
            f"--hub_model_id {repository}: the token is of {account['name']}, expected a repository of "
            f"{' or '.join(owners)}; to propose it to others, add --hub_create_pr"
        )


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    pull_request: bool = False,
    base_model: str | None = None,
) -> str:
    """Upload an adapter folder to the Hub as `repository` (owner/name), in one commit, and return its URL.

    Data that the Hub already has is not sent again, so a second call resumes an interrupted upload. Only
    `adapter.folder.FILES` are uploaded; other files in the repository are kept. The code in the card gets the
    repository's name, and no path of this machine is uploaded: a backbone from a local folder is called by the
    folder's name.

    Args:
        folder: adapter folder of a finished run; it is not changed.
        repository: created if missing, unless for a pull request.
        private: make a new repository private; an existing one keeps its visibility.
        revision: branch to write to, created if missing.
        pull_request: open a pull request instead, and return its URL.
        base_model: name on the Hub (owner/name) of a backbone from a local folder.

    Raises `HistoError` if the folder is not an adapter folder, or the upload fails; the same call tries again.
    """
    folder = Path(folder)
    contents = in_public(folder, repository, base_model)
    api = HfApi()
    try:
        if not pull_request:
            api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # the predictions
            commit = api.create_commit(
                repository,
                [CommitOperationAdd(name, content) for name, content in contents.items()],
                commit_message="Upload hf_histo adapter",
                revision=revision,
                create_pr=pull_request,
            )
    except FAILURES as error:
        again = f"hf_histo push --adapter {folder} --hub_model_id {repository}"
        again += " --hub_private" if private else ""
        again += f" --hub_revision {revision}" if revision else ""
        again += " --hub_create_pr" if pull_request else ""
        again += f" --hub_base_model {base_model}" if base_model else ""
        raise HistoError(
            f"--hub_model_id {repository}: the upload failed: {_reason(error)}. {folder} is complete; after that, "
            f"{again} resumes it"
        ) from None
    return str(commit.pr_url or commit.repo_url)


def in_public(folder: Path, here: str, base_model: str | None = None) -> dict[str, Path | bytes]:
    """Content of an adapter folder to upload, by file name: `files_of` it, without paths of this machine.

    The code in the card refers to `here`. A backbone from a local folder is called `base_model`, its name on the Hub,
    or else by the folder's name; its fingerprint identifies it. Checksums are those of the uploaded content.

    Raises `HistoError` as `verify` and `files_of` do, and for a `base_model` if the backbone is not a local folder.
    """
    if ensemble.is_ensemble(folder):
        return _ensemble_in_public(folder, here, base_model)
    name = verify(folder).backbone.name
    is_local = Path(name).is_absolute()
    if base_model and not is_local:
        raise HistoError(f"--hub_base_model {base_model}: the backbone is known as {name} already; leave it out")
    public = base_model or Path(name).name if is_local else name
    contents: dict[str, Path | bytes] = {**files_of(folder)}
    texts = {}
    for file, quoted in {CARD: repr, SIDECAR: json.dumps, "adapter_config.json": json.dumps}.items():
        if isinstance(path := contents.get(file), Path):
            texts[file] = path.read_text(encoding="utf-8").replace(quoted(name), quoted(public))
    if CARD in texts:
        texts[CARD] = texts[CARD].replace(HERE, here)
        if base_model:
            texts[CARD] = texts[CARD].replace("---\n", f"---\nbase_model: {base_model}\n", 1)
    contents |= {file: text.encode() for file, text in texts.items()}
    files = checksums({name: contents[name] for name in hashed(contents)})
    return contents | {CHECKSUMS: json.dumps({"files": files}, indent=2).encode()}


def _ensemble_in_public(folder: Path, here: str, base_model: str | None) -> dict[str, Path | bytes]:
    """As `in_public`: the ensemble's own files, which name no path, and those of its members in their folders.

    A member's card keeps its placeholder: the Hub has no name for a folder within a repository.
    """
    members = ensemble.read(folder).members
    files = ensemble.files_of(folder)
    contents: dict[str, Path | bytes] = {**files}
    if CARD in files:
        contents[CARD] = files[CARD].read_text(encoding="utf-8").replace(HERE, here).encode()
    for member in members:
        public = in_public(folder / member, HERE, base_model)
        contents |= {f"{member}/{name}": content for name, content in public.items()}
    return contents


def _reason(error: BaseException) -> str:
    """The Hub's error, or why it did not answer, and the remedy, in one line without the token."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set, and it is not in the cache; unset it to use the Hub"
    answer = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    if answer is None:
        reason, remedy = f"{type(chain[-1]).__name__}: {chain[-1]}", REMEDIES.get(type(chain[-1]), "try again")
    else:
        status = answer.response.status_code
        reason = f"status {status}" + (f", {answer.server_message}" if answer.server_message else "")
        remedy = REMEDIES.get(status, "a fault of the Hub: try again later")
    reason = " ".join(reason.split())[:300]
    return f"{reason.replace(get_token() or chr(0), '***')}; {remedy}"
