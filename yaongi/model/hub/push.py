"""A model folder to the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from yaongi import cli


def open_repository(name: str, private: bool) -> None:
    """Make the repository if it isn't there: a key that is wrong or missing shows before any work.

    Raises:
        ValueError: huggingface_hub is not installed, the name has another form, or the hub refuses it.
        OSError: the hub can't be reached.
    """
    cli.require("huggingface_hub")
    from huggingface_hub import HfApi

    def make() -> None:
        HfApi().whoami()  # where a repository is there, `create_repo` alone takes any token
        HfApi().create_repo(name, private=private, exist_ok=True)

    _asked(name, make)


def push_folder(folder: Path, name: str, message: str, revision: str = "main") -> str:
    """Upload a folder's files, but for hidden ones, as one commit, and return its address; errors as above.

    Args:
        revision: branch, made if it isn't there.
    """
    from huggingface_hub import HfApi

    def upload() -> Any:
        if revision != "main":
            HfApi().create_branch(name, branch=revision, exist_ok=True)
        return HfApi().upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, revision=revision, ignore_patterns=[".*"]
        )

    return str(_asked(name, upload).commit_url)


def _asked(name: str, ask: Callable[[], Any]) -> Any:
    """Return what the hub answers; `HTTPError` is the base of all errors of its client."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        return ask()
    except HFValidationError:
        raise ValueError(f"hub: --push-to must be OWNER/NAME, got {name!r}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = "a token that may write to it (HF_TOKEN)" if status in (401, 403) else "a repository that it takes"
        raise ValueError(f"hub: --push-to must name {why}, got {name} and status {status}") from None
    except HTTPError as error:
        raise ConnectionError(f"hub: not reached: {cli.one_line(error)}") from None
