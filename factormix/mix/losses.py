"""The two losses of stage 1 (MixDA, section 3.2): L = lambda * L_K + L_S.

L_K, new knowledge: next token for causal models, masked tokens for masked ones. Of structured knowledge, a prompt with
its object, only the object's tokens count.

L_S, old knowledge, on general text: how far the adapted model is from the base. By default at its outputs,

    L_S = mean_t KL(base || adapted)                                       ``distil``

over the tokens t that are not padding (masked language models: the masked ones). The paper's place for it is the FFN,
at the adapted model's own states x: how far each adapter moves its FFN's output,

    L_S = mean over sites of  mean_t |A(x_t)|^2 / mean_t |F(x_t)|^2        ``normalised``

F(x) + A(x) is the FFN's output with the adapter and F(x) the one without; the
released code compared a tensor with itself. The ``paper`` form is the plain mean of A(x)^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from factormix.mix.config import InjectConfig
from factormix.mix.peft_tuner import MixDALayer
from factormix.train import bf16_pays, distillation

KEEP_SHARE, RANDOM_SHARE = 0.1, 0.1  # of the tokens to predict, BERT leaves 10 % as they are and swaps 10 % at random


class _Enough(Exception):
    """Every adapted site has run: what comes after cannot change L_S."""


class InjectionLoss:
    """The weighted parts of L for one micro-batch.

    Args:
        model: the adapted model, as it is without PEFT's or a Trainer's wrappers.
        domain: the adapter that trains.
        config: weights and forms.
        mask_token: the tokenizer's mask token for a masked language model, None for a causal one.
        head: last hidden states (B, L, H) -> logits (B, L, V), for a model that has no head itself.
    """

    def __init__(
        self,
        model: nn.Module,
        domain: str,
        config: InjectConfig,
        mask_token: int | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.domain, self.config, self.mask_token, self.head = model, domain, config, mask_token, head
        self.bf16 = bf16_pays(next(model.parameters()).device)  # the loop's autocast is around its own wrapper only
        self.layers = [m for m in model.modules() if isinstance(m, MixDALayer) and domain in m.mixda_adapters]

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The scalars "knowledge" and, where there is general text and L_S is not left out, "old".

        Args:
            model: `self.model` in whatever wrapper trains it.
            batch: "input_ids", "attention_mask" (B, L); "counted" (B, L) bool, the tokens L_K may predict;
                "structured" () bool; and where L_S is taken "general_ids", "general_mask" (B', L'), "old_weight" ().
        """
        parts = {"knowledge": self.config.knowledge_weight * self.knowledge(model, batch)}
        if self.config.old_knowledge != "none" and "general_ids" in batch:
            parts["old"] = batch["old_weight"] * self.old(batch["general_ids"], batch["general_mask"])
        return parts

    def knowledge(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """L_K of a batch, a scalar; 0 where the masking drew no token."""
        ids, counted = batch["input_ids"], batch["counted"]
        if self.mask_token is None:
            logits = self._logits(model, ids, batch["attention_mask"])  # (B, L, V)
            return _cross_entropy(logits[:, :-1], ids[:, 1:], counted[:, 1:])
        if bool(batch["structured"]):  # the object's tokens, all of them
            shown, counted = ids.masked_fill(counted, self.mask_token), counted  # (B, L)
        else:
            shown, counted = self.masked(ids, counted)  # (B, L), (B, L)
        return _cross_entropy(self._logits(model, shown, batch["attention_mask"]), ids, counted)

    def masked(self, ids: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """`mask_tokens` with this model's mask token, vocabulary and share."""
        assert self.mask_token is not None
        vocab = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator, union-attr, arg-type]
        return mask_tokens(ids, candidates, self.config.mask, self.mask_token, vocab)

    def old(self, ids: Tensor, mask: Tensor) -> Tensor:
        """L_S on general text, ids (B, L) and mask (B, L) with 0 for padding; a scalar."""
        if self.config.old_knowledge == "distil":
            return self._distance_of_outputs(ids, mask)
        kept = mask.bool().flatten()  # (T,)
        ratios = []
        for of_ffn, of_adapter in self._outputs(ids, mask):
            f, a = (o.reshape(-1, o.shape[-1])[kept].float() for o in (of_ffn, of_adapter))  # (T', H) each
            moved = a.square().sum(-1).mean()
            if self.config.old_knowledge == "paper":
                ratios.append(moved / a.shape[-1])
            else:
                ratios.append(moved / f.detach().square().sum(-1).mean())
        return torch.stack(ratios).mean()

    def _distance_of_outputs(self, ids: Tensor, mask: Tensor) -> Tensor:
        """mean_t KL(base || adapted); ids (B, L), mask (B, L)."""
        counted = mask.bool()  # (B, L)
        if self.mask_token is not None:
            ids, counted = self.masked(ids, counted)  # (B, L), (B, L)
            if not bool(counted.any()):
                return ids.sum() * 0.0
        with self._without_dropout(), torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad(), self._without_adapters():
                base = self._logits(self.model, ids, mask)  # (B, L, V)
            return distillation(self._logits(self.model, ids, mask), base, counted)

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
        """Else base and adapted model, run one after the other, would differ by their dropout already."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _logits(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        said = model(input_ids=ids, attention_mask=mask, **no_cache(self.model))
        return said.logits if self.head is None else self.head(said.last_hidden_state)  # type: ignore[no-any-return]

    def _outputs(self, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(F(x), A(x)) at every use of every adapted site, each (B, L, H). The forward ends at the last one."""
        seen: list[tuple[Tensor, Tensor]] = []
        uses = sum(layer.use_count for layer in self.layers)
        autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16)
        with self._watching(seen, uses), autocast, suppress(_Enough):
            self.model(input_ids=ids, attention_mask=mask, **no_cache(self.model))
        return seen

    @contextmanager
    def _watching(self, seen: list[tuple[Tensor, Tensor]], uses: int) -> Iterator[None]:
        base: dict[int, Tensor] = {}

        def ffn_said(key: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                base[key] = output

            return hook

        def adapter_said(key: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                seen.append((base.pop(key), output))
                if len(seen) == uses:
                    raise _Enough

            return hook

        handles = []
        for key, layer in enumerate(self.layers):
            handles.append(layer.base_layer.register_forward_hook(ffn_said(key)))
            handles.append(layer.mixda_adapters[self.domain].register_forward_hook(adapter_said(key)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def mask_tokens(ids: Tensor, candidates: Tensor, share: float, mask_token: int, vocab: int) -> tuple[Tensor, Tensor]:
    """BERT's masking: what the model sees and which tokens it must predict, both (B, L).

    Random numbers come from torch's own generator, whose state a Trainer's checkpoint keeps.

    Args:
        ids: (B, L).
        candidates: (B, L) bool, tokens that may be predicted; each is with probability `share`.
        share: of the candidates.
        mask_token: its id.
        vocab: ids below it may stand for a token swapped at random.
    """
    predicted = candidates & (torch.rand(ids.shape, device=ids.device) < share)  # (B, L)
    how = torch.rand(ids.shape, device=ids.device)  # (B, L)
    swapped = torch.where(how < RANDOM_SHARE, torch.randint_like(ids, vocab), mask_token)
    return torch.where(predicted & (how < 1 - KEEP_SHARE), swapped, ids), predicted


def no_cache(model: nn.Module) -> dict[str, bool]:
    """use_cache=False for models that would keep keys and values."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


def _cross_entropy(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted tokens: logits (B, L, V), ids (B, L), counted (B, L) bool -> a scalar."""
    if not bool(counted.any()):
        return logits.sum() * 0.0
    return nn.functional.cross_entropy(logits[counted].float(), ids[counted])
