"""Upload an exported directory to a hub, with huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub

from factormix.run.errors import FactorMixError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(name: str) -> None:
    """Refuse, before anything is computed, a name that cannot be, or a push that nobody is logged in for.

    Raises:
        FactorMixError: says which.
    """
    if not _NAME.fullmatch(name):
        raise FactorMixError(f"--push received {name!r}; allowed: OWNER/NAME, such as me/smollm2-s8a4e24.")
    if huggingface_hub.get_token() is None:
        raise FactorMixError("--push needs a hub login: run `hf auth login`, or set HF_TOKEN.")


def push_directory(folder: Path, name: str) -> str:
    """Make the repository if there is none, upload `folder`, and return where it is.

    Raises:
        FactorMixError: the hub refused or was not reached; the directory stays as it is.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:  # of the hub client and of the connection
        raise FactorMixError(
            f"{str(folder)!r} is written, but pushing it to {name!r} failed ({type(error).__name__}: {error}). Check "
            "the name, the login and the connection, and upload it with `hf upload`."
        ) from error
