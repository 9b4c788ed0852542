"""A masked language-modelling head for an encoder that came without one (a sentence encoder, say), so that text can
teach it: the family's own, its decoder tied to the word embeddings, trained on general text under a frozen encoder.

    head, _ = train_head(encoder, general, config, tokenizer)     # before stage 1
    inject(encoder, "pubmed", batches, config, tokenizer, head=head)

The head is no part of the adapter: it learns what the encoder's states say of a masked word, and knows no domain. It is
kept in the adapter's directory as ``masked_head.safetensors``, under the names of the family's ForMaskedLM class.
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
LEARNING_RATE = 3e-3  # of 1e-3, 3e-3 and 1e-2 the least that is as good as any, MiniLM on 61k tokens of Brown


def needs_head(model: PreTrainedModel) -> bool:
    """True for a bare encoder whose family has a masked-LM class."""
    config = type(model.config)
    return (
        config in MODEL_FOR_MASKED_LM_MAPPING
        and config in MODEL_MAPPING
        and base_class(model) is MODEL_MAPPING[config]
        and not model.config.is_encoder_decoder
        and getattr(model.config, "legacy", True)  # DeBERTa's newer head asks the encoder for its embeddings as it runs
    )


class _Passing(nn.Module):
    """In the encoder's place: the states that are given are the states that come out."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=cast(Any, inputs_embeds))


class MaskedHead(nn.Module):
    """The masked-LM head of an encoder's family, above that encoder.

    Its ``state_dict`` holds the head alone: not the encoder, nor the word embeddings that decode.

    Args:
        encoder: a model that `needs_head`; it is left as it is.

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
        self.family.tie_weights()  # the biases that two modules share
        setattr(self.family, self.family.base_model_prefix, _Passing())
        words = cast(Tensor, encoder.get_input_embeddings().weight)  # (V, H)
        decoder = nn.Parameter(words.detach().float(), requires_grad=False)  # the same memory where that is float32
        self.family.get_output_embeddings().weight = decoder
        self.family.to(words.device).eval()
        self.__dict__["encoder"] = encoder  # not registered: frozen, and not of the head
        self.trained = frozenset(name for name, p in self.named_parameters() if p is not decoder)
        hold_only_trained(self)

    def forward(self, input_ids: Tensor, where: Tensor) -> Tensor:
        """Logits at some tokens, through the frozen encoder: input_ids (B, L), where (B, L) bool -> (M, V)."""
        with torch.no_grad():
            said = self.encoder(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        return self.logits(said.last_hidden_state[where][None])[0]  # (1, M, H) -> (M, V)

    def logits(self, states: Tensor) -> Tensor:
        """Last hidden states (B, L, H) -> logits (B, L, V), float32 outside autocast."""
        return cast(Tensor, self.family(inputs_embeds=states.float()).logits)

    def tensors(self) -> dict[str, Tensor]:
        """What its file holds, by the names of the family's class."""
        return {n.removeprefix("family."): p.detach() for n, p in self.named_parameters() if n in self.trained}

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file.

        Raises:
            FactorMixError: a tensor missing, unexpected or of another shape.
        """
        own = self.tensors()
        check_tensors(own, dict(tensors), "masked-LM head")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


class HeadedEncoder(nn.Module):
    """A bare encoder under a head that was trained for it, as a masked language model: (N, L) -> logits (N, L, V).

    Args:
        encoder: a model that `needs_head`, with or without adapters.
        folder: of the head's file, as `load_head`.
    """

    def __init__(self, encoder: PreTrainedModel, folder: str | Path) -> None:
        super().__init__()
        self.encoder, self.head, self.config = encoder, load_head(encoder, folder), encoder.config

    def forward(self, input_ids: Tensor, **more: Any) -> MaskedLMOutput:
        """input_ids (N, L) -> logits (N, L, V)."""
        states = self.encoder(input_ids=input_ids, **more).last_hidden_state  # (N, L, H)
        return MaskedLMOutput(logits=cast(Any, self.head.logits(states)))

    def get_output_embeddings(self) -> nn.Module:
        """What decodes: the word embeddings, (V, H)."""
        return self.encoder.get_input_embeddings()


class HeadLoss:
    """Masked tokens of plain text, for `factormix.train`.

    Args:
        share: of the tokens of text, to predict.
        mask_token: its id.
        vocab: ids below it may stand for a token swapped at random.
    """

    def __init__(self, share: float, mask_token: int, vocab: int) -> None:
        self.share, self.mask_token, self.vocab = share, mask_token, vocab

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scalar "head", 0 where the masking drew no token; batch has "input_ids", "scored" (B, L)."""
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
    """Train a masked-LM head for an encoder that has none; the encoder stays as it is, bit for bit.

    Args:
        encoder: a model that `needs_head`.
        general: windows of general text.
        config: `head_tokens`, `mask`, and the loop's numbers; the learning rate is `LEARNING_RATE`.
        tokenizer: for its mask token.
        work: checkpoints and the finished head go there; a killed run goes on from them.
        quiet: no progress bar and no remark.

    Returns:
        The head, frozen, and {"tokens", "parameters", "history"}.

    Raises:
        FactorMixError: no mask token, too few tokens for one step, NaN in the loss.
    """
    mask = mask_token(tokenizer, encoder)
    torch.manual_seed(config.seed)  # the head's start
    head = MaskedHead(encoder).requires_grad_(False)
    if work is not None and work.done("head"):
        tensors, done = work.load("head")
        head.fill(tensors)
        return head, done
    say(
        f"{type(encoder).__name__} has no masked-LM head: its family's, tied to the word embeddings, is trained first "
        f"on {config.head_tokens:,} tokens of general text, the encoder frozen.",
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
    """The head that was trained beside an adapter, for its encoder: ``head.logits(encoder(ids).last_hidden_state)``.

    Raises:
        FactorMixError: an encoder that has a head, no such file, a damaged one, one of another model.
    """
    if not needs_head(encoder):
        raise FactorMixError(f"{type(encoder).__name__} is no bare encoder of a family with a masked-LM head.")
    head = MaskedHead(encoder)
    head.fill(read_tensors(Path(folder) / HEAD))
    return head.requires_grad_(False)
