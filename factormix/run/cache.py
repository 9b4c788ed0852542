"""Where FactorMix keeps what it made once for this machine: converted assets, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$FACTORMIX_CACHE``, else ``$XDG_CACHE_HOME/factormix``, else ``~/.cache/factormix``; not created here."""
    if os.environ.get("FACTORMIX_CACHE"):
        return Path(os.environ["FACTORMIX_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "factormix"
