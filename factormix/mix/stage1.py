"""Stage 1 of MixDA, top to bottom: a model, knowledge and general text in, a domain adapter out.

sizes -> adapters beside the FFNs (PEFT) -> one loop over L = lambda * L_K + L_S -> only the adapter has changed
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from factormix.data.packing import mask_token
from factormix.mix.adapter_files import check_domain
from factormix.mix.batches import Stage1Batches
from factormix.mix.config import InjectConfig
from factormix.mix.losses import InjectionLoss
from factormix.mix.masked_head import MaskedHead, needs_head
from factormix.mix.peft_tuner import MixDAConfig, MixDALayer, adapter_names, assert_trainable
from factormix.mix.sizes import Sizes, adapter_sizes
from factormix.nn import DomainAdapter, base_class, sites_of, vocabulary_head
from factormix.nn.rms import rms
from factormix.run.errors import FactorMixError
from factormix.run.workdir import WorkDirectory
from factormix.train import LoopConfig, train

LR_IN = 0.05  # of in_proj's root mean square; 1e-2 on SmolLM2
LR_OUT = 0.17  # see peak_rates; 5e-3 on SmolLM2


def plan(model: PreTrainedModel, config: InjectConfig) -> Sizes:
    """Which FFNs get an adapter and how large it is; a model on the meta device will do.

    Raises:
        FactorMixError: a model without a head to learn from, layers or a budget that cannot be.
    """
    if not needs_head(model):
        learns_by(model)
    parameters = sum(p.numel() for p in model.parameters())
    return adapter_sizes(
        sites_of(model), parameters,
        form=config.form, reads=config.source, layers=config.layers,
        width=config.width, reduction=config.reduction, budget=config.budget,
    )  # fmt: skip


def learns_by(model: PreTrainedModel) -> str:
    """ "causal" or "masked": which language-modelling loss the model's head has.

    Raises:
        FactorMixError: neither.
    """
    head = vocabulary_head(model)
    if head in ("causal", "masked") and not model.config.is_encoder_decoder:
        return head
    raise FactorMixError(
        f"{base_class(model).__name__} has neither a causal nor a masked language-modelling head, so no text can teach "
        "an adapter. Load the model as an AutoModelForCausalLM or AutoModelForMaskedLM."
    )


def peak_rates(adapted: PeftModel, domain: str) -> dict[str, float]:
    """Peak learning rate of each of an adapter's tensors, by its name in the model, where none is given.

    AdamW moves every weight by about its rate at first, and all neurons of an adapter the same way for the same text,
    while an FFN's own add up as random signs do. So its output moves by as much, beside what the FFN's own make, where
    the rate of W_out is this share of `row_norm` over the neurons that a token crosses, in all layers together. The
    rows of W_in move by a share of their size at the start.
    """
    layers = {
        name: m for name, m in adapted.named_modules() if isinstance(m, MixDALayer) and domain in m.mixda_adapters
    }
    crossed = sum(m.use_count * cast(DomainAdapter, m.mixda_adapters[domain]).spec.width for m in layers.values())
    rates = {}
    for name, layer in layers.items():
        adapter = cast(DomainAdapter, layer.mixda_adapters[domain])
        of_in = LR_IN * rms(adapter.in_proj)
        of_out = LR_OUT * layer.row_norm() / crossed
        for inner, _ in adapter.named_parameters():
            rates[f"{name}.mixda_adapters.{domain}.{inner}"] = of_in if inner.startswith("in_") else of_out
    return rates


def inject(
    model: PreTrainedModel,
    domain: str,
    batches: Stage1Batches,
    config: InjectConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    head: MaskedHead | None = None,
    work: WorkDirectory | None = None,
    quiet: bool = False,
) -> tuple[PeftModel, dict[str, Any]]:
    """Train one domain's adapter; every other parameter stays as it was, bit for bit.

    Args:
        model: a dense or FactorMix model with a causal or masked language-modelling head, or an encoder beside `head`;
            the adapters are put into it.
        domain: the adapter's name.
        batches: knowledge and general text.
        config: the recipe.
        tokenizer: for its mask token; needed by masked language models only.
        head: of an encoder without a masked-LM head, from `masked_head.train_head`; it stays as it is.
        work: checkpoints go there, and a killed run goes on from the last one.
        quiet: no progress bar.

    Returns:
        The model in PEFT's wrapper, adapter active, nothing trainable; and seconds, tokens, peak_bytes,
        params_trained, metrics (sizes, loss parts by step).

    Raises:
        FactorMixError: a bad name or model, too few tokens for one step, NaN in the loss.
    """
    check_domain(domain)
    sizes = plan(model, config)
    if head is None and needs_head(model):
        raise FactorMixError(
            f"{base_class(model).__name__} has no masked-LM head; train one first, with masked_head.train_head, and "
            "give it as `head`."
        )
    mask = mask_token(tokenizer, model) if head is not None or learns_by(model) == "masked" else None
    torch.manual_seed(config.seed)  # the adapters' start
    peft_config = MixDAConfig(form=config.form, reads=config.source, layers=list(sizes.layers), width=sizes.width)
    adapted = cast(PeftModel, get_peft_model(model, peft_config, adapter_name=domain))
    peft_config.base_model_name_or_path = (
        None  # Trainer's checkpoints would look there for a vocabulary of another size
    )
    trained = adapter_names(adapted, domain)
    assert_trainable(adapted, trained, "after get_peft_model")
    loop = LoopConfig.of(config)
    loss = InjectionLoss(model, domain, config, mask, None if head is None else head.logits)
    with tempfile.TemporaryDirectory() as scratch:
        folder = scratch if work is None else work.path / "stage1"
        rates = dict.fromkeys(trained, config.lr) if config.lr is not None else peak_rates(adapted, domain)
        result = train(adapted, batches, loss, rates, loop, folder, label=f"injecting {domain}", quiet=quiet)
    assert_trainable(adapted, trained, "after training")
    adapted.set_requires_grad(domain, False)
    assert_trainable(adapted, set(), "after stage 1")
    done = asdict(result)
    peaks = [min(rates.values()), max(rates.values())]
    done["metrics"] = {"adapter": sizes.to_dict(), "lr": peaks, **result.metrics}
    return adapted, done
