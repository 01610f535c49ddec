# pyright: reportUnknownMemberType=false
"""From a model's name to the folder that holds it, downloaded if need be; and from a folder to the
name and revision that identify it.

Downloads go through huggingface_hub into its own cache, where a broken connection is taken up again
and a complete model works offline (``HF_HUB_OFFLINE=1``). Only the files that a model is made of
are ever asked for: no code, no pickles, no sub-folders. The names that a hub (``HF_ENDPOINT``)
gives files are checked before the client makes paths of them, and weights by its SHA-256.
"""

import json
import re
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_onevision.checkpoint.hub_names import COMMIT, check_bytes, checked_names
from mlx_onevision.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    OneVisionError,
    RequestError,
    short,
)

DEMO = "demo"
EMBEDDED = Path(__file__).parents[1] / DEMO

# The sizes' final stage ("one vision": images, several images, video). The 7b and 72b also exist as
# "-ov-chat-hf", tuned further for conversation; those are reached by their full ids.
ALIASES: Mapping[str, str] = {
    size: f"llava-hf/llava-onevision-qwen2-{size}-ov-hf" for size in ("0.5b", "7b", "72b")
}

# What belongs to a model besides its weights and config.json, under the same name everywhere.
SIDECARS = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    *SIDECARS,
    "mlx_onevision_manifest.json",
    "adapter_config.json",
    "README.md",
    "LICENSE*",
)
# Patterns match across slashes, so that sub-folders (an onnx/ with gigabytes) need naming; names
# that mean something to a file system are never asked for either.
NOT_FILES = ("*/*", "*\\*", "*:*", "*\0*", ".*")

# What the Hub takes as an id.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
PASSWORD = re.compile(r"://[^/\s]*@")
CONFIG_TIMEOUT = 10.0  # seconds
TAKES = "a folder, a Hugging Face id (org/name), 0.5b, 7b, 72b or demo"


def resolve(
    model: str | Path,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> Path:
    """The folder of a model.

    model : ``demo`` (the embedded model), a size alias, a folder, or a Hugging Face id, tried in
        this order; ``./demo`` and a ``Path`` are always folders. An alias stands for the size's
        ``-ov-hf`` checkpoint (see ``ALIASES``).
    revision : a branch, tag or commit of a Hugging Face model; its main branch if None.
    cache_dir, endpoint : instead of huggingface_hub's own, which its environment variables set.

    Raises:
        ModelNotFoundError: if there is no such model, or none that can be reached.
        RequestError: for a revision of something that has none.
        CheckpointError: for a folder with links that lead out of it, pipes or devices.
    """
    name = str(model)
    repository = repository_of(model)
    if repository is not None:
        with translated_errors(repository, revision, endpoint):
            _check_config(repository, revision, cache_dir, endpoint)
        return _download(repository, revision, cache_dir, endpoint)
    folder = _existing(EMBEDDED if model == DEMO else name)
    if folder is None:
        raise ModelNotFoundError(f"There is no model '{short(name)}'; a model is {TAKES}")
    if not folder.is_dir():
        raise ModelNotFoundError(f"{short(name)} is a file; a model is the folder that holds it")
    if revision is not None:
        raise RequestError(f"{short(name)} is a folder and has no revisions; leave it out")
    check_files(folder)
    return folder


def check_files(folder: Path) -> None:
    """CheckpointError for a model's file that is no file of the folder's own: a link that leads out
    of it would have the converter copy, and maybe publish, what it leads to, and a pipe or a device
    never ends. In the Hub's cache, a folder is made of links to the repository's blobs. Weights,
    which are nothing but arrays, may lie elsewhere.
    """
    own = {folder.resolve()}
    if folder.parent.name == "snapshots":
        own.add((folder.parents[1] / "blobs").resolve())
    for path in folder.iterdir():
        if not any(fnmatchcase(path.name, pattern) for pattern in FILES) or path.is_dir():
            continue
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path.name} is a pipe or a device; put a regular file there")
        linked = path.is_symlink() and path.exists() and path.suffix != ".safetensors"
        if linked and path.resolve().parent not in own:
            raise CheckpointError(
                f"{path.name} is a link that leads out of the model's folder; put the file itself "
                "there"
            )


def not_a_model(name: str | Path, config: Mapping[str, Any]) -> str:
    """What to say of an adapter where a model was wanted; ``config`` : its adapter_config.json."""
    base = config.get("base_model_name_or_path") or config.get("model")
    of = f" of {short(base)}" if isinstance(base, str) and base else ""
    return (
        f"{name} is an adapter{of}, not a model; give the model with --model and the adapter with "
        "--adapter"
    )


def resolve_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter: a folder, or a Hugging Face id.

    Raises:
        ModelNotFoundError: if there is no such adapter, or none that can be reached.
    """
    name = str(adapter)
    folder = _existing(name)
    if folder is None and isinstance(adapter, str) and _is_id(name):
        return _download(name, None, None, None)
    if folder is None or not folder.is_dir():
        raise ModelNotFoundError(
            f"There is no adapter '{short(name)}'; an adapter is a folder or a Hugging Face id "
            "(org/name)"
        )
    return folder


def repository_of(model: str | Path) -> str | None:
    """The Hub's id of a model; None for a folder, and for what is neither."""
    name = str(model)
    if isinstance(model, Path):
        return None
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    there = _existing(EMBEDDED if model == DEMO else name)
    return name if there is None and _is_id(name) else None


def _is_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _existing(name: str | Path) -> Path | None:
    """A file or folder that is there."""
    try:
        path = Path(name).expanduser()
        return path if str(name) and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a NUL
        return None


def _download(
    repository: str, revision: str | None, cache_dir: Path | None, endpoint: str | None
) -> Path:
    since = time.time()
    with (
        translated_errors(repository, revision, endpoint),
        _progress(repository) as bar,
        checked_names(),
    ):
        import huggingface_hub

        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            endpoint=endpoint,
            allow_patterns=list(FILES),
            ignore_patterns=list(NOT_FILES),
            tqdm_class=bar,
        )
        check_bytes(repository, Path(folder), since)
    return Path(folder)


def _check_config(
    repository: str, revision: str | None, cache_dir: Path | None, endpoint: str | None
) -> None:
    """Before anything large is downloaded: whether config.json is of a model that can be loaded.
    Where it cannot be had, or read, nothing is known yet.

    Raises:
        ConfigError: where it is not.
        ModelNotFoundError: for an adapter, which has none.
    """
    import httpx2
    from huggingface_hub import constants, errors, hf_hub_url, try_to_load_from_cache, utils

    from mlx_onevision.config.model import of_this_model

    def fetch(name: str) -> dict[str, Any]:
        # Not the client's own download: it waits long for a network that is not there.
        url = hf_hub_url(repository, name, revision=revision, endpoint=endpoint)
        response = utils.get_session().get(
            url, headers=utils.build_hf_headers(), timeout=CONFIG_TIMEOUT
        )
        utils.hf_raise_for_status(response)
        return dict(json.loads(response.content))

    cached = try_to_load_from_cache(repository, "config.json", cache_dir, revision)
    if constants.HF_HUB_OFFLINE or isinstance(cached, str):
        return  # what is there is judged as it is loaded
    try:
        try:
            values = fetch("config.json")
        except errors.RemoteEntryNotFoundError:
            config = fetch("adapter_config.json")
            raise ModelNotFoundError(not_a_model(repository, config)) from None
    except (errors.HfHubHTTPError, httpx2.HTTPError, ValueError, TypeError):
        return  # the download of the whole model says what it is
    try:
        of_this_model(values)
    except ConfigError as error:
        raise ConfigError(f"{repository}: {error}") from None


@contextmanager
def translated_errors(
    repository: str, revision: str | None = None, endpoint: str | None = None
) -> Generator[None]:
    """Translates the errors of huggingface_hub into one sentence each.

    Raises:
        ModelNotFoundError: for whatever the client raises.
        RequestError: for a revision that cannot be one.
    """
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise RequestError(f"'{short(revision)}' is not a branch, tag or commit")
    import httpx2
    from huggingface_hub import constants, errors

    # Without a password, which an address may have in it.
    host = (endpoint or constants.ENDPOINT).split("://")[-1].rpartition("@")[2]
    named = repository if revision is None else f"{repository} at revision {revision}"
    try:
        yield
    except OneVisionError:
        raise
    except errors.GatedRepoError:
        raise ModelNotFoundError(
            f"{repository} is gated: accept its terms on https://{host}/{repository}, "
            "then sign in with 'hf auth login'"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"{repository} is neither a folder nor a model on {host}; check the name, or sign in "
            "with 'hf auth login' if it is private"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFoundError(f"{repository} has no revision '{revision}'") from None
    except errors.LocalEntryNotFoundError as error:
        raise ModelNotFoundError(_unreached(named, host, error)) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise ModelNotFoundError(
            f"{host} answered {status} when asked for {named}; try again later"
        ) from None
    except httpx2.HTTPError as error:
        raise ModelNotFoundError(
            f"The download of {named} broke off ({type(error).__name__}); run it again, files that "
            "are complete are kept"
        ) from None
    except Exception as error:  # the client's own, a full disk, a proxy: whatever it is
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = PASSWORD.sub("://", lines[0])[:200].rstrip(".")
        raise ModelNotFoundError(f"{named} could not be downloaded: {reason}") from error


@contextmanager
def _progress(repository: str) -> Generator[Any]:
    """A tqdm class for snapshot_download, which makes several bars: of them, the first that counts
    bytes is shown, on a terminal and once it takes longer than a moment.
    """
    from huggingface_hub import constants
    from tqdm import tqdm

    bars: list[Any] = []
    base: Any = tqdm  # which takes type arguments in its stubs alone

    class Bar(base):
        def __init__(self, *args: Any, **settings: Any) -> None:
            if settings.get("unit") == "B" and not bars:
                bars.append(self)
                quiet = True if constants.HF_HUB_DISABLE_PROGRESS_BARS else None
                settings |= {"desc": repository, "bar_format": None, "disable": quiet, "delay": 0.5}
            else:
                settings["disable"] = True
            super().__init__(*args, **settings)

        def set_description(self, *_: Any, **__: Any) -> None:
            """Keeps the model's name where the client would say what it is doing."""

        set_description_str = set_postfix_str = set_description

    try:
        yield Bar
    finally:
        for bar in bars:
            bar.close()


def _unreached(named: str, host: str, error: Exception) -> str:
    """Why something that is not (wholly) in the cache could not be fetched, and the way out."""
    from huggingface_hub import constants, errors

    state = "is not in the cache"
    if "incomplete" in str(error):
        state = "is only partly in the cache"
    if constants.HF_HUB_OFFLINE:
        return f"{named} {state}, and HF_HUB_OFFLINE is set; unset it once to download the model"
    cause = error.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        problem = f"{host} answered {cause.response.status_code}; try again later"
    else:
        problem = f"{host} cannot be reached; connect to the network"
    return f"{named} {state}, and {problem}, or pass the folder of a model"


SAMPLE = 1 << 16  # bytes


def identify(folder: Path, adapter: Path | None = None) -> tuple[str, str]:
    """The name of a checkpoint's folder, and its revision; with an adapter, that of both.

    In the Hub's cache these are the repository's id and the commit. Elsewhere the name is the
    folder's own, and the revision is a hash: of config.json, and of each weight file's size and its
    first and last 64 KB. That notices any other training run without reading all of it.

    Raises:
        ModelNotFoundError: for a folder whose files cannot be read (any more).
    """
    name, revision = _identity(folder, "config.json")
    if adapter is None:
        return name, revision
    other, its_revision = _identity(adapter, "adapter_config.json")
    return f"{name}+{other}", f"{revision}+{its_revision}"


def _identity(folder: Path, config: str) -> tuple[str, str]:
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return repository.removeprefix("models--").replace("--", "/"), folder.name
    digest = blake2b(digest_size=20)
    try:
        digest.update((folder / config).read_bytes())
        for path in sorted(folder.glob("[!.]*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE))
                file.seek(max(size - SAMPLE, 0))
                digest.update(file.read(SAMPLE))
    except OSError as error:
        raise ModelNotFoundError(
            f"{folder} cannot be read any more: {error.strerror}; load the model again"
        ) from None
    name = "demo" if folder == EMBEDDED else folder.resolve().name
    return name, digest.hexdigest()
