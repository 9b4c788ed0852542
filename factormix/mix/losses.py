"""The two losses of stage 1 (MixDA, arXiv 2306.05406, section 3.2): L = lambda * L_K + L_S.

L_K is the loss of new knowledge. Causal models predict the next token, masked models the masked tokens. Structured
knowledge is a prompt with its object, and only the object's tokens count.

L_S is the loss of old knowledge, on general text. It measures how far the adapted model is from the base. By default
it compares their outputs, over the tokens t that are not padding (for masked language models, the masked tokens):

    L_S = mean_t KL(base || adapted)                                       ``distil``

The paper compares at each adapted FFN instead. At the adapted model's own states x, F(x) is the FFN's output without
the adapter and F(x) + A(x) the output with it:

    L_S = mean over sites of  mean_t |A(x_t)|^2 / mean_t |F(x_t)|^2        ``normalised``
    L_S = mean over sites of the mean of A(x_t)^2                          ``paper``

The released code compared a tensor with itself, so its L_S was always 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from factormix.mix.config import InjectConfig
from factormix.mix.peft_tuner import MixDALayer
from factormix.run.errors import choose
from factormix.train import bf16_pays, distillation

KEEP_SHARE, RANDOM_SHARE = 0.1, 0.1  # BERT leaves 10 % of the tokens to predict unchanged and swaps 10 % at random


class _AllSitesRan(Exception):
    """Ends a forward when every adapted site has run, because later layers cannot change L_S."""


class KnowledgeLoss:
    """L_K of one micro-batch.

    Args:
        model: the model, without PEFT's or a Trainer's wrappers.
        mask_token: id of the mask token for a masked language model, None for a causal one.
        share: share of a text's tokens that a masked language model must predict, 0 to 1.
        head: maps last hidden states (B, L, H) to logits (B, L, V), if the model has no head itself.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_token: int | None,
        share: float,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.mask_token, self.share, self.head = model, mask_token, share, head

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """L_K of a batch, a scalar. It is 0 if the masking drew no token.

        Args:
            model: the model, in any wrapper that trains it.
            batch: "input_ids", "attention_mask" (B, L) int64; "counted" (B, L) bool, the tokens that may be predicted;
                "structured" () bool.
        """
        ids, counted = batch["input_ids"], batch["counted"]
        if self.mask_token is None:
            logits = self.logits(model, ids, batch["attention_mask"])  # (B, L, V)
            return _cross_entropy(logits[:, :-1], ids[:, 1:], counted[:, 1:])
        if bool(batch["structured"]):  # all tokens of the object are masked
            shown, counted = ids.masked_fill(counted, self.mask_token), counted  # (B, L)
        else:
            shown, counted = self.masked(ids, counted)  # (B, L), (B, L)
        return _cross_entropy(self.logits(model, shown, batch["attention_mask"]), ids, counted)

    def masked(self, ids: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """`mask_tokens` with this model's mask token, vocabulary and share."""
        assert self.mask_token is not None
        vocab = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr, arg-type]
        return mask_tokens(ids, candidates, self.share, self.mask_token, vocab)

    def logits(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, L, V) of ids (B, L) and mask (B, L)."""
        output = model(input_ids=ids, attention_mask=mask, **no_cache(self.model))
        return output.logits if self.head is None else self.head(output.last_hidden_state)  # type: ignore[no-any-return]


class InjectionLoss:
    """The weighted parts of L for one micro-batch.

    Args:
        model: the adapted model, without PEFT's or a Trainer's wrappers.
        domain: name of the adapter that trains.
        config: gives the weight of L_K, the form of L_S and the masked share.
        mask_token: id of the mask token for a masked language model, None for a causal one.
        head: maps last hidden states (B, L, H) to logits (B, L, V), if the model has no head itself.

    Raises:
        FactorMixError: an unknown form of L_S.
    """

    def __init__(
        self,
        model: nn.Module,
        domain: str,
        config: InjectConfig,
        mask_token: int | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.domain, self.weight = model, domain, config.knowledge_weight
        self.knowledge = KnowledgeLoss(model, mask_token, config.mask, head)
        self.form = choose("old_knowledge", config.old_knowledge, OLD_LOSSES)
        self.bf16 = bf16_pays(next(model.parameters()).device)  # the loop's autocast covers only its own wrapper
        self.layers = [m for m in model.modules() if isinstance(m, MixDALayer) and domain in m.mixda_adapters]

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scalar "knowledge", and the scalar "old" if the batch has general text and L_S is not left out.

        Args:
            model: `self.model`, in any wrapper that trains it.
            batch: as for `KnowledgeLoss`. For L_S also "general_ids", "general_mask" (B', L') int64 and the factor
                "old_weight" () float.
        """
        parts = {"knowledge": self.weight * self.knowledge(model, batch)}
        if OLD_LOSSES[self.form] is not None and "general_ids" in batch:
            parts["old"] = batch["old_weight"] * self.old(batch["general_ids"], batch["general_mask"])
        return parts

    def old(self, ids: Tensor, mask: Tensor) -> Tensor:
        """L_S on general text, a scalar: ids (B, L), mask (B, L) with 0 for padding."""
        compute = OLD_LOSSES[self.form]
        assert compute is not None
        return compute(self, ids, mask)

    def distance_of_outputs(self, ids: Tensor, mask: Tensor) -> Tensor:
        """L_S as ``distil``, see `old`."""
        counted = mask.bool()  # (B, L)
        if self.knowledge.mask_token is not None:
            ids, counted = self.knowledge.masked(ids, counted)  # (B, L), (B, L)
            if not bool(counted.any()):
                return ids.sum() * 0.0
        with self._without_dropout(), torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad(), self._without_adapters():
                base = self.knowledge.logits(self.model, ids, mask)  # (B, L, V)
            return distillation(self.knowledge.logits(self.model, ids, mask), base, counted)

    def relative_shift(self, ids: Tensor, mask: Tensor) -> Tensor:
        """L_S as ``normalised``, see `old`."""
        outputs = self._kept_outputs(ids, mask)
        return torch.stack([_mean_square(a) / _mean_square(f.detach()) for f, a in outputs]).mean()

    def plain_shift(self, ids: Tensor, mask: Tensor) -> Tensor:
        """L_S as ``paper``, see `old`."""
        return torch.stack([_mean_square(a) / a.shape[-1] for _, a in self._kept_outputs(ids, mask)]).mean()

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        for layer in self.layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.enable_adapters(True)

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        """Switch dropout off, because otherwise the runs of base and adapted model would differ by their dropout."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _kept_outputs(self, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(F(x), A(x)) of the tokens that are not padding, at every use of every adapted site: (T, H) float32 each."""
        kept = mask.bool().flatten()  # (B * L,)
        outputs = self._outputs(ids, mask)  # (B, L, H) or (B * L, H) each
        return [(f.reshape(len(kept), -1)[kept].float(), a.reshape(len(kept), -1)[kept].float()) for f, a in outputs]

    def _outputs(self, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(F(x), A(x)) at every use of every adapted site, each (B, L, H). The forward ends at the last one."""
        seen: list[tuple[Tensor, Tensor]] = []
        uses = sum(layer.use_count for layer in self.layers)
        autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16)
        with self._watching(seen, uses), autocast, suppress(_AllSitesRan):
            self.model(input_ids=ids, attention_mask=mask, **no_cache(self.model))
        return seen

    @contextmanager
    def _watching(self, seen: list[tuple[Tensor, Tensor]], uses: int) -> Iterator[None]:
        base: dict[int, Tensor] = {}

        def note_ffn(key: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                base[key] = output

            return hook

        def note_adapter(key: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                seen.append((base.pop(key), output))
                if len(seen) == uses:
                    raise _AllSitesRan

            return hook

        handles = []
        for key, layer in enumerate(self.layers):
            handles.append(layer.base_layer.register_forward_hook(note_ffn(key)))
            handles.append(layer.mixda_adapters[self.domain].register_forward_hook(note_adapter(key)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


OLD_LOSSES: dict[str, Callable[[InjectionLoss, Tensor, Tensor], Tensor] | None] = {
    "distil": InjectionLoss.distance_of_outputs,
    "normalised": InjectionLoss.relative_shift,
    "paper": InjectionLoss.plain_shift,
    "none": None,
}
"""The forms of L_S by the values of `InjectConfig.old_knowledge`."""


def mask_tokens(ids: Tensor, candidates: Tensor, share: float, mask_token: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Mask tokens as BERT does.

    Random numbers come from torch's global generator, because a Trainer's checkpoint keeps its state.

    Args:
        ids: (B, L) int64.
        candidates: (B, L) bool, the tokens that may be predicted. Each is chosen with probability `share`.
        share: expected share of the candidates, 0 to 1.
        mask_token: id of the mask token.
        vocab: a token that is swapped at random becomes an id below this.

    Returns:
        The ids that the model sees (B, L) int64, and the tokens that it must predict (B, L) bool.
    """
    predicted = candidates & (torch.rand(ids.shape, device=ids.device) < share)  # (B, L)
    how = torch.rand(ids.shape, device=ids.device)  # (B, L)
    swapped = torch.where(how < RANDOM_SHARE, torch.randint_like(ids, vocab), mask_token)
    return torch.where(predicted & (how < 1 - KEEP_SHARE), swapped, ids), predicted


def no_cache(model: nn.Module) -> dict[str, bool]:
    """{"use_cache": False} for a model that would keep keys and values, else {}."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


def _cross_entropy(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Mean cross-entropy of the counted tokens, a scalar: logits (B, L, V), ids (B, L), counted (B, L) bool."""
    if not bool(counted.any()):
        return logits.sum() * 0.0
    return nn.functional.cross_entropy(logits[counted].float(), ids[counted])


def _mean_square(rows: Tensor) -> Tensor:
    """Mean over rows (T, H) of their squared norm, a scalar."""
    return rows.square().sum(-1).mean()
