"""Check whether a model predicts next tokens or masked tokens, by running it instead of looking at its name."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from factormix.run.errors import FactorMixError

REMEDY = (
    "Perplexity of the next token, decoding and answers need a causal language model (an AutoModelForCausalLM). For a "
    "masked language model, `factormix eval` measures the perplexity of masked tokens. For a model with another head, "
    "`factormix bench` measures prefill, and the numbers by site (label recall, captured norm, output error) show how "
    "much the experts keep."
)
PROBE_TOKENS = 32  # tokens of the test input


def check_next_token(model: nn.Module, name: str = "model") -> None:
    """Check that `model` gives next-token logits that depend on earlier tokens only.

    The last condition is tested by running the model: the logits at the first position must not depend on later
    tokens. BERT loaded as a causal model without ``is_decoder`` fails it, and its perplexity would be meaningless.

    Args:
        model: the model to check.
        name: its name in the message.

    Raises:
        FactorMixError: the model is an encoder-decoder, has no head that generates (encoders, classifiers, masked
            language models), or sees later tokens.
    """
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise FactorMixError(f"{name} ({kind}) is an encoder-decoder, so a text has no next-token logits. {REMEDY}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or not getattr(model, "can_generate", lambda: True)():
        raise FactorMixError(f"{name} ({kind}) does not predict the next token. {REMEDY}")
    if _sees_ahead(model, int(head.weight.shape[0])):
        raise FactorMixError(
            f"{name} ({kind}) sees the tokens that it should predict, as masked language models do. So its logits are "
            f"not next-token logits. {REMEDY}"
        )


def check_masked(model: nn.Module, name: str = "model") -> None:
    """Check that `model` gives logits over its vocabulary that depend on later tokens too.

    Args:
        model: the model to check.
        name: its name in the message.

    Raises:
        FactorMixError: the model has no masked-LM head, is an encoder-decoder, or does not see later tokens.
    """
    kind = type(model).__name__
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise FactorMixError(f"{name} ({kind}) does not predict masked tokens: it has no masked-LM head. {REMEDY}")
    if not _sees_ahead(model, int(head.weight.shape[0])):
        raise FactorMixError(
            f"{name} ({kind}) does not see what follows a masked token, because it is a causal language model. Ask it "
            "for the next token."
        )


def accepts(model: nn.Module, argument: str) -> bool:
    """True if the forward of `model` has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def _sees_ahead(model: nn.Module, vocab: int) -> bool:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (2, PROBE_TOKENS), generator=generator)
    ids[1, 0] = ids[0, 0]  # both rows have the same first token, and all later tokens differ
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            first = [model(input_ids=row[None].to(device), use_cache=False).logits[0, 0].float() for row in ids]
    finally:
        model.train(was_training)
    difference = (first[0] - first[1]).norm() / first[0].norm().clamp_min(1e-12)
    # In float32, causal models give 0 or a rounding error of 1e-6. Tiny random encoders give 3e-4 or more, trained
    # encoders 0.1.
    exact = next(model.parameters()).dtype in (torch.float32, torch.float64)
    return bool(difference > (1e-4 if exact else 2e-2))
