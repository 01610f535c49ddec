# pyright: reportUnknownMemberType=false
"""The Hub's side of a conversion: finding a model, its outline before a download, the upload."""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from mlx_onevision.checkpoint import hub
from mlx_onevision.checkpoint.hub import COMMIT, FILES, HUB_ID, NOT_FILES, identify, resolve
from mlx_onevision.errors import ModelNotFoundError, OneVisionError, RequestError
from mlx_onevision.files import read_json

# What a plan needs beside the headers of the weight files.
OUTLINE = ("*.json", "*.jinja", "README.md")
NOT_OUTLINE = (*NOT_FILES, "tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert.

    name : the Hub's id of it, or the folder's own name.
    base, commit : the Hub's id and commit of the model that it is, if they are known.
    download : bytes that are not on this machine yet.
    """

    folder: Path
    name: str
    base: str | None
    commit: str | None
    download: int = 0


def find(model: str | Path, revision: str | None = None) -> Source:
    """A model's folder, downloaded if need be. Raises ModelNotFoundError as ``resolve`` does."""
    folder = resolve(model, revision)
    name, commit = identify(folder)
    if folder.parent.name == "snapshots" and COMMIT.fullmatch(commit):
        return Source(folder, name, name, commit)
    written = (read_json(folder / "config.json") or {}).get("mlx_onevision")
    if isinstance(written, dict):  # a folder that this converter wrote
        origin = cast(dict[str, Any], written)
        base, commit = origin.get("base_model"), origin.get("revision")
        if isinstance(base, str) and HUB_ID.fullmatch(base):
            known = isinstance(commit, str) and COMMIT.fullmatch(commit)
            return Source(folder, name, base, commit if known else None)
    return Source(folder, name, None, None)


@contextmanager
def outline(model: str | Path, revision: str | None = None) -> Generator[Source]:
    """A model without downloading it: weight files that are not here yet are headers and holes.
    Raises ModelNotFoundError if there is none, or it cannot be reached.
    """
    repository = hub.repository_of(model)
    if repository is None:
        yield find(model, revision)
        return
    with TemporaryDirectory(prefix="mlx-onevision-") as scratch:
        with hub.translated_errors(repository, revision):
            source = _outline(repository, revision, Path(scratch))
        yield source if source is not None else find(model, revision)


def _outline(repository: str, revision: str | None, folder: Path) -> Source | None:
    """None when nothing of the model needs downloading, or nothing can be."""
    import httpx2
    import huggingface_hub
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        commit = HfApi().model_info(repository, revision=revision).sha
    except RevisionNotFoundError:
        raise
    except (httpx2.ConnectError, httpx2.TimeoutException, HfHubHTTPError):
        return None  # the cache may have the model
    disable_progress_bars()
    try:
        files = huggingface_hub.snapshot_download(
            repository,
            revision=commit,
            allow_patterns=list(FILES),
            ignore_patterns=list(NOT_FILES),
            dry_run=True,
        )
        if not any(file.will_download for file in files):
            return None
        huggingface_hub.snapshot_download(
            repository,
            revision=commit,
            local_dir=folder,
            allow_patterns=list(OUTLINE),
            ignore_patterns=list(NOT_OUTLINE),
        )
        for name in (file.filename for file in files if file.filename.endswith(".safetensors")):
            header = HfApi().parse_safetensors_file_metadata(repository, name, revision=commit)
            _write_outline(folder / name, header.tensors)
    finally:
        enable_progress_bars()
    download = sum(file.file_size or 0 for file in files if file.will_download)
    return Source(folder, repository, repository, commit, download)


def _write_outline(path: Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file of these tensors that takes no room: its data are a hole."""
    keys = ("dtype", "shape", "data_offsets")
    entries = {name: {key: getattr(t, key) for key in keys} for name, t in tensors.items()}
    text = json.dumps(entries).encode()
    end = max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def upload(folder: Path, repository: str, *, private: bool = False, create_pr: bool = False) -> str:
    """Uploads a folder into a repository, made if there is none, in one commit that also removes
    weight files of another model. Returns the address of the commit, or of the pull request; raises
    OneVisionError when the Hub does not take it.
    """
    if not HUB_ID.fullmatch(repository):
        raise RequestError(f"'{repository}' is not a repository's id, such as name/model")
    import httpx2
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    hub.check_files(folder)
    ours = sorted(path.name for path in folder.iterdir() if path.is_file() and is_model_file(path))
    way_out = f"it is whole in {folder}; try 'hf upload {repository} {folder}'"
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.list_repo_files(repository)
        stale = [n for n in there if n.endswith(".safetensors") and "/" not in n and n not in ours]
        added = [CommitOperationAdd(name, folder / name) for name in ours]
        changes = [*added, *map(CommitOperationDelete, stale)]
        message = "Upload a model converted by mlx-onevision"
        done = api.create_commit(repository, changes, commit_message=message, create_pr=create_pr)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ModelNotFoundError(
                f"the Hub does not let you write to {repository}; sign in with 'hf auth login', "
                f"then {way_out.partition('; ')[2]}"
            ) from None
        raise OneVisionError(f"the Hub answered {status} to the upload; {way_out}") from None
    except (httpx2.HTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise OneVisionError(f"the upload broke off ({reason}); {way_out}") from None
    return str(done.pr_url if create_pr else done.commit_url)


def is_model_file(path: Path) -> bool:
    """Whether a file's name is one of those that a model's folder has."""
    named = any(fnmatchcase(path.name, pattern) for pattern in FILES)
    return named and not path.name.startswith(".")
