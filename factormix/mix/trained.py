"""Make checkpoints that hold only the parameters that train. All others are frozen, and in the files they came from."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def hold_only_trained(module: nn.Module) -> None:
    """Limit ``state_dict`` and ``load_state_dict`` to the parameters named in ``module.trained``.

    Args:
        module: a module with `trained`, a set of names of its parameters.
    """
    module.register_state_dict_post_hook(_keep)
    module.register_load_state_dict_post_hook(_forgive)


def _keep(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in list(state):
        if name.removeprefix(prefix) not in cast(Any, module).trained:
            del state[name]


def _forgive(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in cast(Any, module).trained]
