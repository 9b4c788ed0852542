"""Upload an exported directory to a hub, with huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub

from factormix.run.errors import FactorMixError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(name: str) -> None:
    """Check, before anything is computed, that a push can work.

    Raises:
        FactorMixError: the name is not OWNER/NAME, or there is no login for the hub.
    """
    if not _NAME.fullmatch(name):
        raise FactorMixError(f"--push received {name!r}; allowed: OWNER/NAME, such as me/smollm2-s8a4e24.")
    if huggingface_hub.get_token() is None:
        raise FactorMixError("--push needs a hub login. Run `hf auth login`, or set HF_TOKEN.")


def push_directory(folder: Path, name: str) -> str:
    """Upload `folder`, and return its address. The repository is created if there is none.

    Raises:
        FactorMixError: the hub refused or could not be reached. The directory stays unchanged.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except Exception as error:  # the hub's client and the connection raise many classes
        raise FactorMixError(
            f"{str(folder)!r} is written, but pushing it to {name!r} failed ({type(error).__name__}: {error}). Check "
            "the name, the login and the connection, and upload it with `hf upload`."
        ) from error
