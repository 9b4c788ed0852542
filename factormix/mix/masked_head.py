"""Train a masked-LM head for an encoder that has none, such as a sentence encoder, so that text can teach it.

    head, _ = train_head(encoder, general, config, tokenizer)     # before stage 1
    inject(encoder, "pubmed", batches, config, tokenizer, head=head)

It is the head of the encoder's family, with its decoder tied to the word embeddings. It is trained on general text
above the frozen encoder. It is not part of the adapter, because it learns to read masked words from the encoder's
states and learns no domain. The adapter's directory holds it as ``masked_head.safetensors``, under the names of the
family's ForMaskedLM class.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING

from factormix.data.packing import Packed, mask_token
from factormix.mix.config import InjectConfig
from factormix.mix.losses import mask_tokens
from factormix.mix.task_adapters import check_tensors
from factormix.mix.trained import hold_only_trained
from factormix.nn import base_class
from factormix.run.errors import FactorMixError
from factormix.run.progress import say
from factormix.run.tensors import read_tensors, write_tensors
from factormix.run.workdir import WorkDirectory
from factormix.train import LoopConfig, train

HEAD = "masked_head.safetensors"
LEARNING_RATE = 3e-3  # the smallest of 1e-3, 3e-3 and 1e-2 that is as good as the best; MiniLM, 61k tokens of Brown


def needs_head(model: PreTrainedModel) -> bool:
    """True for a bare encoder whose family has a masked-LM class."""
    config = type(model.config)
    return (
        config in MODEL_FOR_MASKED_LM_MAPPING
        and config in MODEL_MAPPING
        and base_class(model) is MODEL_MAPPING[config]
        and not model.config.is_encoder_decoder
        and getattr(model.config, "legacy", True)  # DeBERTa's newer head reads the encoder's embeddings while it runs
    )


class _Passing(nn.Module):
    """Replaces the encoder: it returns the states that it gets."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=cast(Any, inputs_embeds))


class MaskedHead(nn.Module):
    """The masked-LM head of an encoder's family, above that encoder.

    Its ``state_dict`` holds only the head, without the encoder and without the word embeddings that decode.

    Args:
        encoder: a model for which `needs_head` is True; it stays unchanged.

    Attributes:
        family: the family's ForMaskedLM class without its encoder, float32, random at the start.
        trained: names of the head's parameters in this module.
    """

    encoder: PreTrainedModel

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        assert needs_head(encoder)
        config = copy.deepcopy(encoder.config)
        config.tie_word_embeddings = True
        self.family: Any = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
        self.family.tie_weights()  # two modules share the decoder's bias
        setattr(self.family, self.family.base_model_prefix, _Passing())
        words = cast(Tensor, encoder.get_input_embeddings().weight)  # (V, H)
        decoder = nn.Parameter(words.detach().float(), requires_grad=False)  # shares memory if it is float32
        self.family.get_output_embeddings().weight = decoder
        self.family.to(words.device).eval()
        self.__dict__["encoder"] = encoder  # not registered, because it is frozen and not part of the head
        self.trained = frozenset(name for name, p in self.named_parameters() if p is not decoder)
        hold_only_trained(self)

    def forward(self, input_ids: Tensor, where: Tensor) -> Tensor:
        """Logits at the M tokens of `where`, through the frozen encoder.

        Args:
            input_ids: (B, L) int64, without padding.
            where: (B, L) bool.

        Returns:
            (M, V), float32 outside autocast.
        """
        with torch.no_grad():
            output = self.encoder(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        return self.logits(output.last_hidden_state[where][None])[0]  # (1, M, H) -> (M, V)

    def logits(self, states: Tensor) -> Tensor:
        """Last hidden states (B, L, H) -> logits (B, L, V), float32 outside autocast."""
        return cast(Tensor, self.family(inputs_embeds=states.float()).logits)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its file, by the names of the family's class."""
        return {n.removeprefix("family."): p.detach() for n, p in self.named_parameters() if n in self.trained}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the tensors of its file.

        Raises:
            FactorMixError: a tensor is missing, unexpected or of another shape.
        """
        own = self.tensors()
        check_tensors(own, dict(tensors), "masked-LM head")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


class HeadedEncoder(nn.Module):
    """A masked language model made of a bare encoder and the head that was trained for it.

    Args:
        encoder: a model for which `needs_head` is True, with or without adapters.
        folder: the directory of the head's file.

    Raises:
        FactorMixError: see `load_head`.
    """

    def __init__(self, encoder: PreTrainedModel, folder: str | Path) -> None:
        super().__init__()
        self.encoder, self.head, self.config = encoder, load_head(encoder, folder), encoder.config

    def forward(self, input_ids: Tensor, **more: Any) -> MaskedLMOutput:
        """input_ids (N, L) int64 -> logits (N, L, V)."""
        states = self.encoder(input_ids=input_ids, **more).last_hidden_state  # (N, L, H)
        return MaskedLMOutput(logits=cast(Any, self.head.logits(states)))

    def get_output_embeddings(self) -> nn.Module:
        """The word embeddings (V, H), which decode."""
        return self.encoder.get_input_embeddings()


class HeadLoss:
    """The loss of masked tokens of plain text, for `factormix.train`.

    Args:
        share: share of the text's tokens that must be predicted, 0 to 1.
        mask_token: id of the mask token.
        vocab: a token that is swapped at random becomes an id below this.
    """

    def __init__(self, share: float, mask_token: int, vocab: int) -> None:
        self.share, self.mask_token, self.vocab = share, mask_token, vocab

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scalar "head", which is 0 if the masking drew no token. `batch` has "input_ids", "scored" (B, L)."""
        ids = batch["input_ids"]
        shown, predicted = mask_tokens(ids, batch["scored"], self.share, self.mask_token, self.vocab)
        logits = model(shown, predicted)  # (M, V)
        total = nn.functional.cross_entropy(logits.float(), ids[predicted], reduction="sum")
        return {"head": total / max(1, len(logits))}


def train_head(
    encoder: PreTrainedModel,
    general: Packed,
    config: InjectConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    work: WorkDirectory | None = None,
    quiet: bool = False,
) -> tuple[MaskedHead, dict[str, Any]]:
    """Train a masked-LM head for an encoder that has none. The encoder stays unchanged, bit for bit.

    Args:
        encoder: a model for which `needs_head` is True.
        general: windows of general text.
        config: gives `head_tokens`, `mask` and the numbers of the loop. The learning rate is `LEARNING_RATE`.
        tokenizer: gives the mask token.
        work: directory of the checkpoints and of the finished head, from which a killed run continues.
        quiet: show no progress bar and no message.

    Returns:
        The frozen head, and {"tokens", "parameters", "history"}.

    Raises:
        FactorMixError: there is no mask token, the tokens are too few for one step, or the loss is NaN.
    """
    mask = mask_token(tokenizer, encoder)
    torch.manual_seed(config.seed)  # the head's start
    head = MaskedHead(encoder).requires_grad_(False)
    if work is not None and work.done("head"):
        tensors, done = work.load("head")
        head.fill(tensors)
        return head, done
    say(
        f"{type(encoder).__name__} has no masked-LM head, so its family's head is trained first, on "
        f"{config.head_tokens:,} tokens of general text. The encoder stays frozen.",
        quiet,
    )
    loss = HeadLoss(config.mask, mask, cast(Any, encoder.get_input_embeddings()).num_embeddings)
    loop = LoopConfig.of(config, tokens=config.head_tokens)
    rates = dict.fromkeys(head.trained, LEARNING_RATE)
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if work is None else work.path / "head"
        result = train(head, general, loss, rates, loop, folder, label="training a masked-LM head", quiet=quiet)
    done = {"tokens": result.tokens, "parameters": result.params_trained, "history": result.metrics["history"]}
    if work is not None and PartialState().is_main_process:
        work.save("head", head.tensors(), done)
    return head, done


def save_head(head: MaskedHead, folder: Path) -> None:
    """Write the head's file into a folder."""
    write_tensors(folder / HEAD, head.tensors())


def load_head(encoder: PreTrainedModel, folder: str | Path) -> MaskedHead:
    """Load the head that was trained beside an adapter: ``head.logits(encoder(ids).last_hidden_state)``.

    Args:
        encoder: the bare encoder.
        folder: the adapter's directory.

    Raises:
        FactorMixError: the encoder has a head, or the file is missing, damaged or of another model.
    """
    if not needs_head(encoder):
        raise FactorMixError(
            f"{type(encoder).__name__} is no bare encoder; allowed: a bare encoder of a family with a masked-LM head."
        )
    head = MaskedHead(encoder)
    head.fill(read_tensors(Path(folder) / HEAD))
    return head.requires_grad_(False)
