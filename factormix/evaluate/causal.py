"""Which models have next-token logits, and which those of masked tokens: told by what they do, not by their names."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from factormix.run.errors import FactorMixError

REMEDY = (
    "Perplexity of the next token, decoding and answers need a causal language model (an AutoModelForCausalLM); of a "
    "masked one `factormix eval` takes the perplexity of masked tokens. For a model with another head, `factormix "
    "bench` measures prefill, and the numbers by site (label recall, captured norm, output error) tell what the "
    "experts keep."
)
PROBE_TOKENS = 32


def check_next_token(model: nn.Module, name: str = "model") -> None:
    """Raise FactorMixError unless `model` gives next-token logits that look at earlier tokens only.

    Three ways to fail: an encoder-decoder; no head that generates (encoders, classifiers, masked language models); and
    such a head over an encoder that sees the tokens to come (BERT loaded as a causal model without ``is_decoder``),
    whose perplexity would be a lie. The last is found by running it: the logits at the first position must not
    depend on what follows.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise FactorMixError(f"{name} ({kind}) is an encoder-decoder and has no next-token logits of a text. {REMEDY}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not getattr(model, "can_generate", lambda: True)():
        raise FactorMixError(f"{name} ({kind}) does not predict the next token. {REMEDY}")
    if _sees_ahead(model, int(head.weight.shape[0])):
        raise FactorMixError(
            f"{name} ({kind}) sees the tokens that it should predict, as masked language models do, so its "
            f"logits are not next-token logits. {REMEDY}"
        )


def check_masked(model: nn.Module, name: str = "model") -> None:
    """Raise FactorMixError unless `model` gives logits over its vocabulary that look at later tokens too."""
    kind = type(model).__name__
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise FactorMixError(f"{name} ({kind}) does not predict masked tokens: it has no masked-LM head. {REMEDY}")
    if not _sees_ahead(model, int(head.weight.shape[0])):
        raise FactorMixError(
            f"{name} ({kind}) does not see what follows a masked token: it is a causal language model. Ask it for the "
            "next token."
        )


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the forward of `model` has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def _sees_ahead(model: nn.Module, vocab: int) -> bool:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (2, PROBE_TOKENS), generator=generator)
    ids[1, 0] = ids[0, 0]  # same first token, everything after it differs
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            first = [model(input_ids=row[None].to(device), use_cache=False).logits[0, 0].float() for row in ids]
    finally:
        model.train(was_training)
    difference = (first[0] - first[1]).norm() / first[0].norm().clamp_min(1e-12)
    # float32: causal models give 0 or rounding, 1e-6; encoders, even tiny random ones, 3e-4 and more, trained ones 0.1
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return bool(difference > (1e-4 if exact else 2e-2))
