"""Task adapters: the small part that learns the task in stage 2 (MixDA, section 3.3), above frozen domain adapters.

=========  ===============================================================================================
pfeiffer   a bottleneck in series after every FFN (Pfeiffer et al., 2021)
houlsby    the same, and another after every attention's output projection (Houlsby et al., 2019)
lora       PEFT's LoRA on the attention's query and value
prefix     PEFT's prefix tuning: virtual keys and values before the first token
none       nothing
=========  ===============================================================================================

A bottleneck reads the output of its sublayer before anything is added to it: dropout, residual and post-norm come
after, in encoders (BERT's ``output.dense``, now inside the FFN's one module) as in decoders (llama's ``mlp`` and
``self_attn.o_proj``). Where FFN and attention run in parallel (phi, gpt_neox, cohere) each has its own. An FFN that
several layers share (ALBERT) has one adapter for all its uses. Beside domain adapters, the bottleneck reads the sum:

    y = z + W_up act(W_down z + b_down) + b_up,    z = g_0(x) F(x) + sum_d g_d(x) A_d(x)

W_up and b_up start at zero, so a fresh adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from factormix.experts.packed import activation
from factormix.ffn import FFNSite, isolate
from factormix.ffn.attention import attention_output
from factormix.mix.adapt_config import TASK_ADAPTERS, AdaptConfig
from factormix.run.errors import FactorMixError, choose

ACTIVATION = {"pfeiffer": "relu", "houlsby": "silu"}  # as in AdapterHub's configs of these names
START_STD = 0.02  # of W_down


@dataclass(frozen=True)
class TaskAdapterSpec:
    """All that decides a task adapter's shapes.

    Attributes:
        kind: one of `TASK_ADAPTERS`.
        reduction: hidden size / width, of pfeiffer and houlsby.
        rank: of lora.
        tokens: virtual tokens of prefix.
    """

    kind: str
    reduction: float = 16
    rank: int = 8
    tokens: int = 30

    def __post_init__(self) -> None:
        choose("task adapter", self.kind, TASK_ADAPTERS)

    @classmethod
    def of_config(cls, config: AdaptConfig, task_kind: str) -> TaskAdapterSpec:
        """What a config asks for; plain text trains the gates alone.

        Raises:
            FactorMixError: a task adapter asked for on plain text.
        """
        kind = config.adapter_for(task_kind)
        if task_kind == "text" and kind != "none":
            raise FactorMixError(
                f"task adapter {kind!r} received for plain text, which trains the gates alone; allowed: 'none'. Leave "
                "it out, or give labelled text or prompts with targets."
            )
        return cls(kind, config.reduction, config.lora_rank, config.prefix_tokens)


class TaskAdapter(nn.Module):
    """What stage 2 asks of every kind; this one is `none`."""

    def __init__(self, spec: TaskAdapterSpec) -> None:
        super().__init__()
        self.spec = spec

    def trained(self) -> list[nn.Parameter]:
        """Its parameters, those inside the model included."""
        return list(self.parameters())

    def enable(self, on: bool) -> None:
        """Run it, or not."""

    def prefix(self, batch: int) -> dict[str, Any]:
        """Keys and values before the first token for so many sequences, by the name of the model's argument; empty for
        every kind but prefix."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What a file of it holds, by name."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take the tensors of a file.

        Raises:
            FactorMixError: a tensor missing, unexpected or of another shape.
        """
        check_tensors(self.tensors(), tensors, f"task adapter {self.spec.kind!r}")
        self.load_state_dict(tensors)


class Bottleneck(nn.Module):
    """One bottleneck in series: (..., H) -> (..., H); computes in float32 weights' dtype, returns the input's.

    Attributes:
        down: H -> width.
        up: width -> H, zero at the start.
    """

    def __init__(self, hidden: int, reduction: float, act: str) -> None:
        super().__init__()
        width = max(1, int(hidden / reduction))
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.act = activation(act)
        nn.init.normal_(self.down.weight, std=START_STD)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor) -> Tensor:
        """z (..., H) -> (..., H)."""
        h = self.act(self.down(z.to(self.down.weight.dtype)))  # (..., width)
        return z + self.up(h).to(z.dtype)  # (..., H)


class BottleneckAdapters(TaskAdapter):
    """pfeiffer or houlsby: bottlenecks that forward hooks put behind FFNs and attentions.

    Attributes:
        after: the bottlenecks, "ffn-3" after the FFN of site 3, "attention-3" after the attention of its layer.
    """

    def __init__(self, spec: TaskAdapterSpec, model: nn.Module, sites: Sequence[FFNSite]) -> None:
        super().__init__(spec)
        self.enabled = True
        self.after = nn.ModuleDict()
        for site in sites:
            places = {f"ffn-{site.index}": isolate(model, site)}
            if spec.kind == "houlsby":
                places[f"attention-{site.index}"] = model.get_submodule(attention_output(model, site))
            for name, module in places.items():
                bottleneck = Bottleneck(site.hidden, spec.reduction, ACTIVATION[spec.kind])
                self.after[name] = bottleneck.to(next(module.parameters()).device)
                module.register_forward_hook(self._behind(bottleneck))

    def _behind(self, bottleneck: Bottleneck) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            return bottleneck(output) if self.enabled else None

        return hook

    def enable(self, on: bool) -> None:
        """Run the bottlenecks, or let everything pass."""
        self.enabled = on


def check_tensors(wanted: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Hold the tensors of a file against those that are needed.

    Raises:
        FactorMixError: names what is missing, unexpected or of another shape.
    """
    if wanted.keys() != found.keys():
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        raise FactorMixError(
            f"{what}: the file lacks {missing[:3]} and has {extra[:3]} beside; it was made for another model, or is "
            "damaged. Load it on the base it was made from, or make it anew."
        )
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise FactorMixError(
                f"{what}: {name} has shape {tuple(found[name].shape)} in the file and {tuple(tensor.shape)} here; it "
                "was made for another model. Load it on the base it was made from."
            )
