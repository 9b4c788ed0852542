"""One door for every directory that FactorMix can open: its own, and the containers that it exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from factormix import checkpoint
from factormix.nn import Quantize, check_quantize
from factormix.nn import quantize as quantize_ffns
from factormix.run.errors import FactorMixError

CONTAINER_FILE = "factormix.json"  # `factormix.export` writes it beside a container's weights


def load(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
    auto_class: str | None = None,
    quantize: Quantize | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a FactorMix directory, or a stock container that ``factormix export`` wrote, as a FactorMix model.

    Args:
        path: the directory, or the hub name of a FactorMix directory.
        dtype: of the weights; "auto" keeps the file's.
        device_map, auto_class, kwargs: see `factormix.checkpoint.load`; a container takes none of them.
        quantize: "int8": see `factormix.quantize`.

    Raises:
        FactorMixError: see `factormix.checkpoint.load`; a container that was approximated, which is another model;
            another way to quantise.
    """
    check_quantize(quantize)
    model = _load(path, dtype, device_map, auto_class, **kwargs)
    return model if quantize is None else quantize_ffns(model)


def _load(
    path: str | Path,
    dtype: torch.dtype | str,
    device_map: str | dict[str, Any] | None,
    auto_class: str | None,
    **kwargs: Any,
) -> PreTrainedModel:
    if not (Path(path) / CONTAINER_FILE).is_file():
        return checkpoint.load(path, dtype, device_map, auto_class, **kwargs)
    given = {"device_map": device_map, "auto_class": auto_class, **kwargs}
    if named := sorted(name for name, value in given.items() if value is not None):
        raise FactorMixError(
            f"{str(path)!r} is an exported container, which loads back without {', '.join(named)}; leave it out, or "
            "save the loaded model as a FactorMix directory first."
        )
    from factormix.export.load import from_container  # six families of containers, only where one is opened

    return from_container(Path(path), dtype)
