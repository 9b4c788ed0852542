"""Where each family keeps its FFN: a table, data not code.

A new family is one entry. Open the family's ``modeling_*.py``, find the two or three Linears of the FFN, and say

- ``at``: the module that holds them, relative to the model, ``*`` for an index. The pattern is matched against the END
  of the dotted name, so one entry serves the base model and every head class ("model.layers.3.mlp", "layers.3.mlp").
  The first ``*`` is the layer.
- ``up``, ``down``, ``act`` and, for a gated FFN, ``gate``: names relative to ``at``.
  Gated is ``down(act(gate(x)) * up(x))``, plain is ``down(act(up(x)))``.
- ``fused``: ``up`` is ONE Linear (H -> 2I) whose first I outputs are the gate, the half that goes through ``act``.
- ``kind``: "module" when ``at`` itself is the FFN, (..., H) -> (..., H), and nothing else; "split" when up and down
  live in different modules (BERT: residual and norm sit beside down); "inline" when the layer's own forward calls
  them (OPT, ALBERT).

A user can add an entry at run time too: ``FAMILIES["my_type"] = Family((FFNPaths(at="layers.*.mlp", ...),))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["module", "split", "inline"]
Stack = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class FFNPaths:
    """Where one kind of layer keeps its FFN. The top of this file explains the fields."""

    at: str
    up: str
    down: str
    act: str
    gate: str | None = None
    fused: bool = False
    kind: Kind = "module"
    stack: Stack = "decoder"
    grouped: bool = False  # True: the first `*` counts config.num_hidden_groups groups of layers that share weights

    @property
    def gated(self) -> bool:
        """True when a gate multiplies the up projection."""
        return self.fused or self.gate is not None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names relative to ``at`` that must exist for this entry to apply."""
        return tuple(part for part in (self.gate, self.up, self.act, self.down) if part is not None)


@dataclass(frozen=True)
class Family:
    """Where the FFNs of one ``model_type`` are.

    Attributes:
        paths: the entries; at each module the first whose parts all exist applies.
        aside: top-level towers that text never crosses. Their matrix products are not counted per token.
    """

    paths: tuple[FFNPaths, ...]
    aside: tuple[str, ...] = ()


def _gated(at: str = "layers.*.mlp", act: str = "act_fn") -> Family:
    return Family((FFNPaths(at=at, gate="gate_proj", up="up_proj", down="down_proj", act=act),))


def _bert() -> Family:
    return Family(
        (
            FFNPaths(
                at="encoder.layer.*",
                up="intermediate.dense",
                act="intermediate.intermediate_act_fn",
                down="output.dense",
                kind="split",
                stack="encoder",
            ),
        )
    )


def _t5() -> Family:
    towers: tuple[tuple[Stack, int], ...] = (("encoder", 1), ("decoder", 2))
    return Family(
        tuple(
            FFNPaths(
                at=f"{stack}.block.*.layer.{place}.DenseReluDense", gate=gate, up=up, down="wo", act="act", stack=stack
            )
            for stack, place in towers
            for gate, up in (("wi_0", "wi_1"), (None, "wi"))
        )
    )


_FUSED = Family((FFNPaths(at="layers.*.mlp", up="gate_up_proj", fused=True, down="down_proj", act="activation_fn"),))

FAMILIES: dict[str, Family] = {
    "albert": Family(
        (
            FFNPaths(
                at="albert_layer_groups.*.albert_layers.*",
                up="ffn",
                act="activation",
                down="ffn_output",
                kind="inline",
                stack="encoder",
                grouped=True,
            ),
        )
    ),
    "bert": _bert(),
    "camembert": _bert(),
    "cohere": _gated(),
    "deberta-v2": _bert(),
    "distilbert": Family(
        (FFNPaths(at="transformer.layer.*.ffn", up="lin1", down="lin2", act="activation", stack="encoder"),)
    ),
    "electra": _bert(),
    "gemma": _gated(),
    "gemma2": _gated(),
    "gemma3": Family(_gated("language_model.layers.*.mlp").paths, aside=("vision_tower", "multi_modal_projector")),
    "gemma3_text": _gated(),
    "glm4": _FUSED,
    "gpt2": Family((FFNPaths(at="h.*.mlp", up="c_fc", down="c_proj", act="act"),)),
    "gpt_neox": Family((FFNPaths(at="layers.*.mlp", up="dense_h_to_4h", down="dense_4h_to_h", act="act"),)),
    "granite": _gated(),
    "llama": _gated(),
    "mistral": _gated(),
    "modernbert": Family((FFNPaths(at="layers.*.mlp", up="Wi", fused=True, down="Wo", act="act", stack="encoder"),)),
    "mt5": _t5(),
    "olmo": _gated(),
    "olmo2": _gated(),
    "olmo3": _gated(),
    "opt": Family((FFNPaths(at="decoder.layers.*", up="fc1", act="activation_fn", down="fc2", kind="inline"),)),
    "phi": Family((FFNPaths(at="layers.*.mlp", up="fc1", down="fc2", act="activation_fn"),)),
    "phi3": _FUSED,
    "qwen2": _gated(),
    "qwen3": _gated(),
    "roberta": _bert(),
    "smollm3": _gated(),
    "stablelm": _gated(),
    "starcoder2": Family((FFNPaths(at="layers.*.mlp", up="c_fc", down="c_proj", act="act"),)),
    "t5": _t5(),
    "umt5": _t5(),
    "xlm-roberta": _bert(),
}
