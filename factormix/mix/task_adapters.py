"""Task adapters: the small part that learns the task in stage 2 (MixDA, arXiv 2306.05406, section 3.3).

=========  ===============================================================================================
pfeiffer   a bottleneck in series after every FFN (Pfeiffer et al., 2021)
houlsby    the same, and another after every attention's output projection (Houlsby et al., 2019)
lora       PEFT's LoRA on the attention's query and value projections
prefix     PEFT's prefix tuning: virtual keys and values before the first token
none       no task adapter
=========  ===============================================================================================

A bottleneck reads the output of its sublayer. Dropout, residual and post-norm come after it. This is so in encoders
(BERT's ``output.dense``, now inside the FFN's one module) and in decoders (llama's ``mlp`` and ``self_attn.o_proj``).
If FFN and attention run in parallel (phi, gpt_neox, cohere) each has its own bottleneck. An FFN that several layers
share (ALBERT) has one bottleneck for all of them. If there are domain adapters, the bottleneck reads the sum:

    y = z + W_up act(W_down z + b_down) + b_up,    z = g_0(x) F(x) + sum_d g_d(x) A_d(x)

W_up and b_up start at zero, so a fresh adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from factormix.experts.packed import activation
from factormix.ffn import FFNSite, isolate
from factormix.ffn.attention import attention_output
from factormix.mix.adapt_config import TASK_ADAPTERS, AdaptConfig
from factormix.run.directory import write_json
from factormix.run.errors import FactorMixError, choose

ACTIVATION = {"pfeiffer": "relu", "houlsby": "silu"}  # the activations in AdapterHub's configs of these names
START_STD = 0.02  # standard deviation of W_down at the start


@dataclass(frozen=True)
class TaskAdapterSpec:
    """The kind and the sizes of a task adapter.

    Attributes:
        kind: one of `TASK_ADAPTERS`.
        reduction: hidden size / width of a pfeiffer or houlsby adapter.
        rank: rank of a lora adapter.
        tokens: virtual tokens of a prefix adapter.

    Raises:
        FactorMixError: an unknown kind.
    """

    kind: str
    reduction: float = 16
    rank: int = 8
    tokens: int = 30

    def __post_init__(self) -> None:
        choose("task adapter", self.kind, TASK_ADAPTERS)

    @classmethod
    def of_config(cls, config: AdaptConfig, task_kind: str) -> TaskAdapterSpec:
        """The task adapter that a config asks for.

        Raises:
            FactorMixError: the config asks for a task adapter on plain text, which trains only the gates.
        """
        kind = config.adapter_for(task_kind)
        if task_kind == "text" and kind != "none":
            raise FactorMixError(
                f"task adapter {kind!r} received for plain text, which trains only the gates; allowed: 'none'. Leave "
                "it out, or give labelled text or prompts with targets."
            )
        return cls(kind, config.reduction, config.lora_rank, config.prefix_tokens)


class TaskAdapter(nn.Module):
    """The interface of every kind. The base class itself is `none`.

    Attributes:
        spec: kind and sizes.
        files: names of its config file and of its weights file.
    """

    files: ClassVar[tuple[str, str]] = ("task_adapter.json", "task_adapter.safetensors")

    def __init__(self, spec: TaskAdapterSpec) -> None:
        super().__init__()
        self.spec = spec

    def trained(self) -> list[nn.Parameter]:
        """All its parameters, including those inside the model."""
        return list(self.parameters())

    def enable(self, on: bool) -> None:
        """Switch the adapter on or off."""

    def prefix(self, batch: int) -> dict[str, Any]:
        """Keys and values before the first token of `batch` sequences, by the name of the model's argument.

        It is empty for every kind except prefix.
        """
        return {}

    def write_config(self, folder: Path) -> None:
        """Write its config file into a folder."""
        write_json(folder / self.files[0], asdict(self.spec))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its weights file, by name."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of its weights file.

        Raises:
            FactorMixError: a tensor is missing, unexpected or of another shape.
        """
        check_tensors(self.tensors(), tensors, f"task adapter {self.spec.kind!r}")
        self.load_state_dict(tensors)


class Bottleneck(nn.Module):
    """One bottleneck in series: (..., H) -> (..., H). It computes in its own dtype and returns the input's dtype.

    Args:
        hidden: H.
        reduction: hidden size / width.
        act: name of the activation.

    Attributes:
        down: maps H -> width.
        up: maps width -> H; zero at the start.
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
    """pfeiffer or houlsby: bottlenecks that forward hooks run after FFNs and attentions.

    Args:
        spec: kind and reduction.
        model: changed in place.
        sites: the model's FFNs.

    Attributes:
        after: the bottlenecks. "ffn-3" runs after the FFN of site 3, "attention-3" after the attention of its layer.

    Raises:
        FactorMixError: for houlsby, a family whose attention output is unknown.
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
        """Switch all bottlenecks on or off."""
        self.enabled = on


def check_tensors(wanted: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Check that a file has the needed tensors.

    Args:
        wanted: the needed tensors, by name.
        found: the file's tensors, by name.
        what: the file's content, for the message.

    Raises:
        FactorMixError: a tensor is missing, unexpected or of another shape; the message names it.
    """
    if wanted.keys() != found.keys():
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        raise FactorMixError(
            f"{what}: the file lacks {missing[:3]} and has unexpected {extra[:3]}; it was made for another model, or "
            "is damaged. Load it on the base it was made from, or make it again."
        )
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise FactorMixError(
                f"{what}: {name} has shape {tuple(found[name].shape)} in the file and {tuple(tensor.shape)} here; it "
                "was made for another model. Load it on the base it was made from."
            )
