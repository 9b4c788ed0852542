"""Healing: end-to-end distillation of a sparse model from its dense teacher (FactorLLM, second step).

    L = kl * KL(dense || sparse) + ce * CE + pa * PA + balance * load balance

A model without a head over the vocabulary has no logits to compare: instead of the KL stands the distance of the last
hidden states, |h - h_dense|^2 / |h_dense|^2, mean over tokens.

Experts, shared neurons and routers train; embeddings, attention, norms and heads are frozen (and, when the student came
from `factorize` or through `share_frozen`, are the teacher's own tensors: the teacher costs its FFNs only).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.data.packing import Packed
from factormix.factor.config import HealConfig
from factormix.factor.fit import label_tokens
from factormix.factor.lockstep import batches_of
from factormix.factor.losses import hidden_distance, last_states, load_balance, router_loss
from factormix.ffn import FFNSite, find_sites, isolate
from factormix.nn import FactorMixMixin, SparseFFN, sites_of, vocabulary_head
from factormix.nn.rms import rms
from factormix.run.errors import FactorMixError
from factormix.run.workdir import WorkDirectory
from factormix.train import LoopConfig, bf16_pays, distillation, train

LR, ROUTER_LR = 2e-3, 1e-4  # peaks, of a tensor's root mean square, where half of the neurons run, or fewer
LEAST_SHARE = 0.1  # of those, however many run


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    text: Packed,
    config: HealConfig,
    *,
    label: str = "joint",
    pa_form: str = "pa",
    seed: int = 0,
    work: WorkDirectory | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Distil in place; see the module's loss.

    Args:
        student: a FactorMix model.
        teacher: the dense model.
        text: windows to train on.
        config: weights and rates.
        label, pa_form: of the PA part, as in FactorConfig.label and router_loss.
        seed: of the order of windows.
        work: checkpoints go there, and a killed run goes on from the last one.
        quiet: no progress bar.

    Returns:
        seconds, tokens, peak_bytes, params_trained, metrics: loss parts by step, lr and router_lr (least and largest
        peak over the tensors; without routers lr alone).

    Raises:
        FactorMixError: no loss weight above 0, CE for a model that predicts no next token, a student that is not
            sparse, NaN in the loss.
    """
    if not isinstance(student, FactorMixMixin):
        raise FactorMixError(f"healing needs a FactorMix model; {type(student).__name__} has no sparse FFN.")
    if not (config.kl or config.ce or config.pa or config.balance):
        raise FactorMixError("healing with kl, ce, pa and balance all 0 trains nothing; give one a weight.")
    if config.ce and not _predicts_next(student):
        raise FactorMixError(
            f"healing with ce {config.ce} needs a model that predicts the next token; {type(student).__name__} does "
            "not. Use ce 0: the distance from the dense model is enough."
        )
    if (config.pa or config.balance) and all(ffn.router is None for ffn in student.sparse_ffns().values()):
        raise FactorMixError(
            f"pa {config.pa} and balance {config.balance} train routers; this model has none. Leave them 0."
        )
    rates = peak_rates(student, config)
    loop = LoopConfig.of(config, seed=seed)
    loss = HealingLoss(student, teacher.eval(), config, label, pa_form)
    with tempfile.TemporaryDirectory() as scratch, loss.watching():
        folder = scratch if work is None else work.path / "healing"
        result = train(student, text, loss, rates, loop, folder, label="healing", quiet=quiet)
    of_routers = [rate for name, rate in rates.items() if _of_a_router(name)]
    of_others = [rate for name, rate in rates.items() if not _of_a_router(name)]
    peaks = {"lr": of_others, "router_lr": of_routers}
    result.metrics |= {key: [min(r), max(r)] for key, r in peaks.items() if r}
    return asdict(result)


def peak_rates(student: PreTrainedModel, config: HealConfig) -> dict[str, float]:
    """Peak learning rate of every parameter that trains, by its name in the model: of experts, shared neurons, routers.

    Left open, it is a fraction of the tensor's own root mean square, which differs by 12 between families: what moves
    one model's weights by 0.2 % a step destroys another's. And it falls with the share of neurons that do not run: the
    less there is to mend, the more a rate that suits half of the neurons first destroys.
    """
    ffns = {name: module for name, module in student.named_modules() if isinstance(module, SparseFFN)}
    idle = 1 - sum(ffn.spec.layout.active_fraction for ffn in ffns.values()) / len(ffns)
    share = min(1.0, max(LEAST_SHARE, 2 * idle))
    rates = {}
    for name, ffn in ffns.items():
        for inner, parameter in ffn.named_parameters():
            given, fraction = (config.router_lr, ROUTER_LR) if _of_a_router(inner) else (config.lr, LR)
            scale = rms(parameter) or 1.0  # of a bias that is still zero
            rates[f"{name}.{inner}"] = share * fraction * scale if given is None else given
    return rates


def _of_a_router(name: str) -> bool:
    """Whether this is a router's parameter, by its name in the FFN or in the model."""
    return "router" in name.split(".")


def share_frozen(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let the student, loaded from its own directory, use the teacher's tensors outside the FFNs, as after `factorize`.

    Raises:
        FactorMixError: the teacher is sparse, or not the dense model that the student was made from.
    """
    if isinstance(teacher, FactorMixMixin) or sites_of(teacher) != sites_of(student):
        raise FactorMixError(
            f"this {type(teacher).__name__} is not the dense model that this {type(student).__name__} was made from; "
            "give that one: healing teaches the sparse model to speak as it does."
        )
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        other = theirs.get(name)
        if other is not None and other.device == parameter.device and torch.equal(other, parameter):
            parameter.data = other.data


class HealingLoss:
    """The weighted parts of the module's loss for a batch of windows."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, config: HealConfig, label: str, pa_form: str
    ) -> None:
        self.student, self.teacher, self.config = student, teacher, config
        self.label, self.pa_form = label, pa_form
        self.bf16 = bf16_pays(teacher.device)
        self.speaks = vocabulary_head(student) is not None
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by site: x (T, H), scores (T, R), chosen (T, K)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """input_ids (B, L), scored (B, L) -> scalars "kl" (or "hidden"), "ce", "pa", "balance" with a weight."""
        config = self.config
        (arguments,) = batches_of(self.student, batch["input_ids"], len(batch["input_ids"]))
        ids = arguments.get("decoder_input_ids", arguments["input_ids"])  # (B, L), or its second half
        scored = batch["scored"][:, -ids.shape[1] :]
        out = model(**arguments, output_hidden_states=not self.speaks)
        counted = scored[:, 1:] if _predicts_next(self.student) else scored  # position l predicts token l + 1, or l
        parts: dict[str, Tensor] = {}
        if config.kl:
            with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16):
                dense = self.teacher(**arguments, output_hidden_states=not self.speaks)
            if self.speaks:
                length = counted.shape[1]
                parts["kl"] = config.kl * distillation(out.logits[:, :length], dense.logits[:, :length], counted)
            else:
                parts["hidden"] = config.kl * hidden_distance(last_states(out), last_states(dense), scored)
        if config.ce:
            found = out.logits[:, :-1][counted].float()  # (T, V)
            parts["ce"] = config.ce * nn.functional.cross_entropy(found, ids[:, 1:][counted])
        # (T,); of an encoder-decoder, whose two stacks see different tokens, all
        text = slice(None) if self.student.config.is_encoder_decoder else scored.flatten()
        if config.pa:
            parts["pa"] = config.pa * self._mean(lambda site, x, z, chosen: self._pa(site, x[text], z[text]))
        if config.balance:
            parts["balance"] = config.balance * self._mean(
                lambda site, x, z, chosen: load_balance(z[text], chosen[text])
            )
        return parts

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what every router sees and says during forwards, where a loss part needs it."""
        handles = []
        if self.config.pa or self.config.balance:
            for index, ffn in self.student.sparse_ffns().items():  # type: ignore[operator]
                if ffn.router is not None:
                    handles.append(ffn.router.register_forward_hook(self._note(index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def _note(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
            self._seen[index] = (inputs[0], *output)

        return hook

    def _mean(self, part: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Mean over sites."""
        return torch.stack([part(index, *seen) for index, seen in self._seen.items()]).mean()

    def _pa(self, index: int, x: Tensor, scores: Tensor) -> Tensor:
        """The router loss at one site; labels from the frozen dense FFN at the student's own x (T, H)."""
        ffn, site = self.student.sparse_ffns()[index], self._sites[index]  # type: ignore[operator]
        with torch.no_grad():
            target = isolate(self.teacher, site)(x)  # (T, H)
            labels = label_tokens(ffn, x, target, self.label)
        return router_loss(self.pa_form, scores, labels)

    @cached_property
    def _sites(self) -> dict[int, FFNSite]:
        return {site.index: site for site in find_sites(self.teacher)}


def _predicts_next(model: PreTrainedModel) -> bool:
    return vocabulary_head(model) in ("causal", "seq2seq")
