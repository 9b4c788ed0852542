"""InjectConfig: every choice of stage 1, the same in Python, in a YAML recipe and as flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from factormix.run.config import Config, option
from factormix.run.errors import FactorMixError


@dataclass(frozen=True)
class InjectConfig(Config):
    """Stage 1 of MixDA: one domain's knowledge into adapters beside frozen FFNs.

    loss = knowledge_weight * L_K + L_S                                    (section 3.2; lambda is knowledge_weight)
    """

    form: str = option(
        "ffn",
        help="ffn: a small FFN of the backbone's kind, which can be merged; bottleneck: the paper's",
        choices=("ffn", "bottleneck"),
    )
    reads: str = option(
        "auto",
        help="what a bottleneck reads: the FFN's neurons (the paper, and auto) or its input; ffn reads the input",
        choices=("auto", "input", "neurons"),
    )
    layers: str = option("auto", help="auto: floor(7L/24), floor(11L/24); spread: every third from L/5 on; or 7,11")
    width: int | None = option(None, help="neurons of an adapter; decides alone where given", minimum=1)
    reduction: float | None = option(None, help="instead of width: hidden size / reduction neurons", minimum=1)
    budget: float = option(
        0.004,
        help="without width and reduction: parameters of a domain, as a share of the model's",
        minimum=0,
        maximum=1,
    )
    knowledge_weight: float = option(0.5, help="lambda, the weight of the knowledge loss L_K", minimum=0)
    old_knowledge: str = option(
        "distil",
        help="the loss L_S that keeps old knowledge: KL from the base's outputs; at the FFNs' outputs, relative to "
        "them or as published; or left out",
        choices=("distil", "normalised", "paper", "none"),
    )
    old_every: int = option(
        4, help="L_S is taken at one micro-batch in so many, with so many times the weight", minimum=1
    )
    mask: float = option(0.15, help="masked language models: share of a text's tokens to predict", minimum=0, maximum=1)
    tokens: int = option(
        150_000, help="tokens of knowledge, padding included; of general text, a part (see old_every)", minimum=1
    )
    head_tokens: int = option(
        150_000,
        help="encoders without a masked-LM head: tokens of general text that one is first trained on",
        minimum=1,
    )
    retain_by: str = option(
        "random",
        help="general text beside each batch of knowledge: random, or the passages nearest to it (slower)",
        choices=("random", "nearest"),
    )
    retriever: str = option("asset:minilm", help="the encoder that finds the nearest: a model as MODEL is named")
    gate_tokens: int = option(
        16_384,
        help="tokens of knowledge, and as many of general text, that the adapter's own gate is fitted on; 0: no gate",
        minimum=0,
    )
    window: int = option(512, help="tokens of a window", minimum=8)
    batch_tokens: int = option(512, help="tokens of knowledge in one optimiser step", minimum=1)
    lr: float | None = option(
        None, help="peak learning rate; left open it follows the FFNs' weights and the adapters' width", minimum=0
    )
    warmup: float = option(0.1, help="fraction of the steps in which the learning rate rises", minimum=0, maximum=1)
    clip: float = option(1.0, help="gradient norm above which gradients are scaled down", minimum=0)
    weight_decay: float = option(0.05, help="AdamW's weight decay", minimum=0)
    max_minutes: float = option(0.0, help="stop in good order after this long; 0 for never", minimum=0)
    save_steps: int = option(20, help="steps between checkpoints a killed run resumes from", minimum=1)
    seed: int = option(0, help="of the adapters' start, the order of the text and the masks")

    def __post_init__(self) -> None:
        layers: Any = self.layers
        if isinstance(layers, int | list | tuple):  # what YAML reads `layers: 7` and `layers: [7, 11]` as
            every = [layers] if isinstance(layers, int) else layers
            object.__setattr__(self, "layers", ",".join(map(str, every)))
        super().__post_init__()

    def validate(self) -> None:
        """Ranges, choices, and settings that contradict each other."""
        super().validate()
        if self.width is not None and self.reduction is not None:
            raise FactorMixError(f"width {self.width} and reduction {self.reduction} both given; give one of them.")
        if self.form == "ffn" and self.reads == "neurons":
            raise FactorMixError("reads 'neurons' goes with form 'bottleneck'; form 'ffn' reads the FFN's input.")
        if self.knowledge_weight == 0:
            raise FactorMixError("knowledge_weight 0 trains nothing: L_S alone is 0 at the start and stays there.")
        if self.retain_by == "nearest" and self.old_knowledge == "none":
            raise FactorMixError("retain_by 'nearest' chooses the text of L_S, which old_knowledge 'none' leaves out.")
        if self.mask == 0:
            raise FactorMixError("mask 0 leaves no token to predict; the usual share is 0.15.")

    @property
    def source(self) -> str:
        """What the adapter reads: "input" or "neurons"."""
        return ("neurons" if self.form == "bottleneck" else "input") if self.reads == "auto" else self.reads
