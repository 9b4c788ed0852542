"""InjectConfig: all options of stage 1. They are the same in Python, in a YAML recipe and as flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from factormix.nn.domain_adapter import Form
from factormix.run.config import Config, option
from factormix.run.errors import FactorMixError

OLD_KNOWLEDGE = ("distil", "normalised", "paper", "none")  # the forms of L_S; `losses.OLD_LOSSES` computes them


@dataclass(frozen=True)
class InjectConfig(Config):
    """Options of stage 1 of MixDA (arXiv 2306.05406), which trains one domain's knowledge into adapters.

    loss = knowledge_weight * L_K + L_S                                    (section 3.2; lambda is knowledge_weight)

    Raises:
        FactorMixError: a value is out of range, or two options contradict each other.
    """

    form: str = option(
        "ffn",
        help="form of an adapter: ffn is a small FFN of the backbone's kind, which can be merged; bottleneck is the "
        "paper's form",
        choices=get_args(Form),
    )
    reads: str = option(
        "auto",
        help="input of a bottleneck: the FFN's neurons (the paper's choice, and the default) or the FFN's input; the "
        "ffn form always reads the FFN's input",
        choices=("auto", "input", "neurons"),
    )
    layers: str = option(
        "auto",
        help="layers that get an adapter: auto is floor(7L/24) and floor(11L/24) of L layers, spread is every third "
        "from L/5 on; or write numbers such as 7,11",
    )
    width: int | None = option(None, help="neurons of an adapter; if given, budget has no effect", minimum=1)
    reduction: float | None = option(
        None, help="sets the width to hidden size / reduction; it cannot be given with width", minimum=1
    )
    budget: float = option(
        0.004,
        help="parameters of a domain as a share of the model's; it sets the width if width and reduction are not given",
        minimum=0,
        maximum=1,
    )
    knowledge_weight: float = option(0.5, help="lambda, the weight of the knowledge loss L_K", minimum=0)
    old_knowledge: str = option(
        "distil",
        help="form of the loss L_S, which keeps old knowledge: distil is the KL of the model's outputs from the "
        "base's; normalised and paper measure each adapter's output, relative to its FFN's output or as published; "
        "none leaves L_S out",
        choices=OLD_KNOWLEDGE,
    )
    old_every: int = option(
        4, help="L_S is computed for every Nth micro-batch only, with N times the weight; this is N", minimum=1
    )
    mask: float = option(
        0.15, help="share of a text's tokens that masked language models must predict", minimum=0, maximum=1
    )
    tokens: int = option(
        150_000,
        help="tokens of knowledge to train on, padding included; general text adds a part of these (see old_every)",
        minimum=1,
    )
    head_tokens: int = option(
        150_000,
        help="tokens of general text on which a masked-LM head is trained first, if an encoder has no such head",
        minimum=1,
    )
    retain_by: str = option(
        "random",
        help="choice of the general text beside a batch of knowledge: random, or the nearest passage (slower)",
        choices=("random", "nearest"),
    )
    retriever: str = option(
        "asset:minilm", help="encoder that finds the nearest passage; it is named in the same way as MODEL"
    )
    gate_tokens: int = option(
        16_384,
        help="the adapter's own gate is fitted on so many tokens of knowledge and as many of general text; 0 fits none",
        minimum=0,
    )
    window: int = option(512, help="tokens of a window of text", minimum=8)
    batch_tokens: int = option(512, help="tokens of knowledge in one optimiser step", minimum=1)
    lr: float | None = option(
        None,
        help="peak learning rate; by default it depends on the size of the FFNs' weights and on the adapters' width",
        minimum=0,
    )
    warmup: float = option(0.1, help="fraction of the steps in which the learning rate rises", minimum=0, maximum=1)
    clip: float = option(1.0, help="gradient norm above which gradients are scaled down", minimum=0)
    weight_decay: float = option(0.05, help="AdamW's weight decay", minimum=0)
    max_minutes: float = option(
        0.0, help="training stops after so many minutes, and the result is saved; 0 means no limit", minimum=0
    )
    save_steps: int = option(20, help="steps between two checkpoints, from which a killed run can continue", minimum=1)
    seed: int = option(0, help="seed of the adapters' initial weights, the order of the text and the masks")

    def __post_init__(self) -> None:
        layers: Any = self.layers
        if isinstance(layers, int | list | tuple):  # YAML reads `layers: 7` and `layers: [7, 11]` as such values
            numbers = [layers] if isinstance(layers, int) else layers
            object.__setattr__(self, "layers", ",".join(map(str, numbers)))
        super().__post_init__()

    def validate(self) -> None:
        """Check ranges and choices, and refuse options that contradict each other."""
        super().validate()
        if self.width is not None and self.reduction is not None:
            raise FactorMixError(f"width {self.width} and reduction {self.reduction} are both given; give one of them.")
        if self.form == "ffn" and self.reads == "neurons":
            raise FactorMixError("reads 'neurons' goes with form 'bottleneck'; form 'ffn' reads the FFN's input.")
        if self.knowledge_weight == 0:
            raise FactorMixError(
                "knowledge_weight 0 trains nothing, because L_S alone is 0 at the start and stays 0; allowed: above 0."
            )
        if self.retain_by == "nearest" and self.old_knowledge == "none":
            raise FactorMixError(
                "retain_by 'nearest' chooses the text of L_S, but old_knowledge 'none' leaves L_S out; change one of "
                "them."
            )
        if self.mask == 0:
            raise FactorMixError("mask 0 leaves no token to predict; allowed: above 0, usually 0.15.")

    @property
    def source(self) -> str:
        """The adapter's input: "input" or "neurons"."""
        return ("neurons" if self.form == "bottleneck" else "input") if self.reads == "auto" else self.reads
