"""Read a stock container that FactorMix wrote back into the factored model.

``factormix.json`` beside the container says how it was made: the dense config, the sparse sites, and the scaling of
routers and down projections. Dividing by powers of two is exact, dividing by K and R is exact to rounding. The mean row
of a router is lost, but it has no influence on the choice. Routers stay float32 in a bfloat16 model, because rounding
harms them most. ``factormix.load`` calls `from_container` if it finds that file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from factormix import checkpoint
from factormix.export.choose import Choice
from factormix.export.container import Block, Container
from factormix.export.containers import CONTAINERS
from factormix.export.needs import Needs, read_needs
from factormix.export.router_scale import RouterScale
from factormix.export.tensors import FFN, folded
from factormix.nn import SparseFFN, base_class
from factormix.run.directory import read_json, write_json
from factormix.run.errors import FactorMixError, choose

ORIGIN = "factormix.json"
FORMAT_VERSION = 1


def write_origin(folder: Path, model: PreTrainedModel, choice: Choice, scale: RouterScale) -> None:
    """Write factormix.json, which `from_container` reads."""
    base_config = model.config.to_dict()
    factormix = base_config.pop("factormix")
    base_config.pop("_name_or_path", None)
    write_json(
        folder / ORIGIN,
        {
            "format_version": FORMAT_VERSION,
            "container": choice.container.name,
            "approximations": list(choice.approximations),
            "copy_shared": choice.needs.copy_shared,
            "m": scale.m,
            "exponents": scale.exponents,
            "architecture": base_class(model).__name__,
            "base_config": base_config,
            "factormix": factormix,
        },
    )


def from_container(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The factored model that `folder` was exported from, in eval mode.

    Args:
        folder: an exported directory.
        dtype: dtype of the weights except routers; "auto" is that of the files.

    Raises:
        FactorMixError: the export was approximated, factormix.json is damaged, or weights are missing.
    """
    origin = read_json(folder / ORIGIN, FORMAT_VERSION)
    container = CONTAINERS[choose("container", origin["container"], CONTAINERS)]
    if origin["approximations"] and not origin["copy_shared"]:
        raise FactorMixError(
            f"{str(folder)!r} was exported with --approximate ({'; '.join(origin['approximations'])}), so it is not "
            "the model it was made from. Load that model, or load this one with transformers."
        )
    config = checkpoint.FactorMixConfig(origin["base_config"], origin["architecture"], origin["factormix"])
    model = checkpoint.empty(config)
    needs = replace(read_needs(model), copy_shared=origin["copy_shared"])
    layers = len(needs.specs)
    scale = RouterScale(origin["m"], tuple(origin["exponents"]), {}, {}, (1.0,) * layers)
    auto: Any = AutoModelForCausalLM
    stock, info = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise FactorMixError(f"{str(folder)!r}: missing tensors: {', '.join(wrong[:5])}. The directory is damaged.")
    state = stock.state_dict()
    wanted = model.state_dict()
    filled = {name: tensor for name, tensor in state.items() if name in wanted and FFN not in name}
    for layer, ffn in enumerate(model.sparse_ffns().values()):  # type: ignore[operator]
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        site = _sparse(container.block(own), ffn, container, needs, scale, layer)
        filled |= {f"{prefix}mlp.{name}": tensor for name, tensor in site.items()}
    target = _dtype(dtype, folder)
    filled = {n: t if n.endswith("router.weight") else t.to(target) for n, t in filled.items()}
    del stock
    found = model.load_state_dict(filled, strict=False, assign=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(found.missing_keys) <= tied and not found.unexpected_keys, found  # checked above for the container
    model.tie_weights()
    _fill_buffers(model)
    return model.eval()


def _dtype(dtype: torch.dtype | str, folder: Path) -> torch.dtype:
    """The dtype asked for, or for "auto" that of the files."""
    named = AutoConfig.from_pretrained(folder, local_files_only=True).dtype if dtype == "auto" else dtype
    return getattr(torch, named) if isinstance(named, str) else named or torch.float32


@torch.no_grad()
def _sparse(
    block: Block, ffn: SparseFFN, container: Container, needs: Needs, scale: RouterScale, layer: int
) -> dict[str, Tensor]:
    """The tensors of a sparse FFN from a container's block. This is the inverse of `tensors.block`."""
    spec, factor = ffn.spec, folded(ffn.spec, container, needs, scale, layer)
    back = 0 if scale.m is None else scale.m - scale.exponents[layer]
    router = torch.ldexp(block.router, torch.tensor(back))  # (R, H)
    gate, up = block.gate_up.chunk(2, dim=1)  # (R, W', H) each
    named = {
        "router.weight": router,
        "experts.gate_up_proj": torch.cat([gate[:, : spec.width], up[:, : spec.width]], dim=1),  # (R, 2W, H)
        "experts.down_proj": _over(block.down[..., : spec.width], factor.expert),  # (R, H, W)
    }
    if spec.shared:
        width, shared_gate_up, shared_down = spec.shared * spec.width, block.shared_gate_up, block.shared_down
        if needs.copy_shared:
            shared_gate_up = torch.cat([gate[0, needs.width :], up[0, needs.width :]])  # (2S, H)
            shared_down = _over(block.down[0, :, needs.width :], factor.shared)  # (H, S)
        assert shared_gate_up is not None and shared_down is not None
        low, high = shared_gate_up.chunk(2)
        named["shared.up_proj.weight"] = torch.cat([low[:width], high[:width]])  # (2 S W, H)
        named["shared.down_proj.weight"] = shared_down[:, :width].contiguous()  # (H, S W)
    return named


def _over(weight: Tensor, factor: float) -> Tensor:
    return weight.contiguous() if factor == 1.0 else weight / factor


def _fill_buffers(model: PreTrainedModel) -> None:
    """Replace modules whose buffers are still on the meta device, because no checkpoint holds rotary frequencies."""
    for name, module in list(model.named_modules()):
        if any(buffer.device.type == "meta" for buffer in module.buffers(recurse=False)):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, type(module)(model.config))
