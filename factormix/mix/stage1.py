"""Stage 1 of MixDA (arXiv 2306.05406, section 3.2): train a domain adapter on knowledge and general text.

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

LR_IN = 0.05  # peak rate of in_proj, as a share of its root mean square; this is 1e-2 on SmolLM2
LR_OUT = 0.17  # peak rate of out_proj, as a share of a bound, see `peak_rates`; this is 5e-3 on SmolLM2


def plan(model: PreTrainedModel, config: InjectConfig) -> Sizes:
    """Compute which FFNs get an adapter, and its size. A model on the meta device is enough.

    Raises:
        FactorMixError: the model has no head to learn by, or the layers or the budget do not fit the model.
    """
    if not needs_head(model):
        learns_by(model)
    parameters = sum(p.numel() for p in model.parameters())
    return adapter_sizes(
        sites_of(model),
        parameters,
        form=config.form,
        reads=config.source,
        layers=config.layers,
        width=config.width,
        reduction=config.reduction,
        budget=config.budget,
    )


def learns_by(model: PreTrainedModel) -> str:
    """The language-modelling loss of the model's head: "causal" or "masked".

    Raises:
        FactorMixError: the head has neither.
    """
    head = vocabulary_head(model)
    if head in ("causal", "masked") and not model.config.is_encoder_decoder:
        return head
    raise FactorMixError(
        f"{base_class(model).__name__} has neither a causal nor a masked language-modelling head, so no text can teach "
        "an adapter. Load the model as an AutoModelForCausalLM or AutoModelForMaskedLM."
    )


def peak_rates(adapted: PeftModel, domain: str) -> dict[str, float]:
    """The default peak learning rate of each tensor of an adapter, by its name in the model.

    AdamW first moves every weight by about its rate, and it moves all neurons of an adapter in the same direction. The
    outputs of an FFN's own neurons add up like random signs instead. So the rate of W_out is `LR_OUT` times the FFN's
    `row_norm` divided by the number of adapter neurons that a token crosses in all layers. A step then changes the
    output by the same share of the FFN's own output in every model. The rate of W_in is `LR_IN` times the size of its
    rows at the start.
    """
    layers = {
        name: m for name, m in adapted.named_modules() if isinstance(m, MixDALayer) and domain in m.mixda_adapters
    }
    crossed = sum(m.use_count * cast(DomainAdapter, m.mixda_adapters[domain]).spec.width for m in layers.values())
    rates = {}
    for name, layer in layers.items():
        adapter = cast(DomainAdapter, layer.mixda_adapters[domain])
        in_rate = LR_IN * rms(adapter.in_proj)
        out_rate = LR_OUT * layer.row_norm() / crossed
        for inner, _ in adapter.named_parameters():
            rates[f"{name}.mixda_adapters.{domain}.{inner}"] = in_rate if inner.startswith("in_") else out_rate
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
    """Train one domain's adapter. Every other parameter stays unchanged, bit for bit.

    Args:
        model: a dense or FactorMix model with a causal or masked language-modelling head, or an encoder if `head` is
            given. The adapters are put into it.
        domain: the adapter's name.
        batches: knowledge and general text, from `stage1_batches`.
        config: the options.
        tokenizer: gives the mask token; only masked language models need it.
        head: for an encoder without a masked-LM head, the result of `masked_head.train_head`. It stays unchanged.
        work: directory of the checkpoints, from which a killed run continues.
        quiet: show no progress bar.

    Returns:
        The model in PEFT's wrapper with the adapter active and nothing trainable. And a dict with seconds, tokens,
        peak_bytes, params_trained, and metrics (sizes, peak learning rates, parts of the loss by step).

    Raises:
        FactorMixError: the name or the model is not allowed, there is no mask token, the tokens are too few for one
            step, or the loss is NaN.
    """
    check_domain(domain)
    sizes = plan(model, config)
    if head is None and needs_head(model):
        raise FactorMixError(
            f"{base_class(model).__name__} has no masked-LM head; train one first with masked_head.train_head, and "
            "give it as `head`."
        )
    mask = mask_token(tokenizer, model) if head is not None or learns_by(model) == "masked" else None
    torch.manual_seed(config.seed)  # for the adapters' initial weights
    peft_config = MixDAConfig(form=config.form, reads=config.source, layers=list(sizes.layers), width=sizes.width)
    adapted = cast(PeftModel, get_peft_model(model, peft_config, adapter_name=domain))
    peft_config.base_model_name_or_path = None  # else Trainer's checkpoints look there for a resized vocabulary
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
