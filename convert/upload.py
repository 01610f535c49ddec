"""A converted folder to the Hub."""

from fnmatch import fnmatchcase
from pathlib import Path

from mlx_onevision.checkpoint.hub import FILES, HUB_ID
from mlx_onevision.errors import ModelNotFoundError, OneVisionError, RequestError


def upload(folder: Path, repository: str, *, private: bool = False, create_pr: bool = False) -> str:
    """Uploads a folder into a repository, which is made if there is none, in one commit: at no
    moment is half a model there. Weight files of another model that the repository had are removed.

    Returns the commit's address, or the pull request's.

    Raises:
        OneVisionError: when the Hub does not take it; the folder stays.
    """
    if not HUB_ID.fullmatch(repository):
        raise RequestError(f"'{repository}' is not a repository's id, such as name/model")
    import httpx2
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    ours = sorted(path.name for path in folder.iterdir() if _is_a_models(path))
    way_out = f"it is whole in {folder}; try 'hf upload {repository} {folder}'"
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.list_repo_files(repository)
        stale = [n for n in there if n.endswith(".safetensors") and "/" not in n and n not in ours]
        done = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, folder / name) for name in ours),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message="Upload a model converted by mlx-onevision",
            create_pr=create_pr,
        )
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


def _is_a_models(path: Path) -> bool:
    return path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in FILES)
