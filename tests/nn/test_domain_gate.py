"""The gate: where it starts, that it looks at one token only, and what it does to the FFN."""

from __future__ import annotations

import pytest
import torch

from factormix import FactorMixError
from factormix.ffn import find_sites, get, swap
from factormix.nn import DomainAdapter, DomainFFN, DomainGate
from tests.families import tiny_model
from tests.nn.test_domain_adapter import fill, spec_for

NAMES = ("pubmed", "reviews")
KINDS = ("sigmoid", "softmax", "paper")


def trained(kind: str, hidden: int = 32) -> DomainGate:
    """A gate with random weights, in eval mode."""
    gate = DomainGate(hidden, NAMES, kind).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return gate


def gated_layer(model, kind: str) -> DomainFFN:  # type: ignore[no-untyped-def]
    site = find_sites(model)[0]
    layer = DomainFFN(get(model, site), site)
    for seed, name in enumerate(NAMES):
        layer.add(name, fill(DomainAdapter(spec_for(site, "ffn", "input")), seed))
    layer.set_gate(trained(kind))
    swap(model, site, layer)
    return layer


def test_default_starts_with_every_weight_1_and_the_ffn_fixed() -> None:
    x = torch.randn(2, 5, 32)
    of_ffn, shares = DomainGate(32, NAMES)(x)
    assert of_ffn is None and torch.equal(shares, torch.ones(2, 5, 2))
    of_ffn, shares = DomainGate(32, NAMES, "softmax")(x)
    assert torch.allclose(of_ffn, torch.ones(2, 5)) and torch.allclose(shares, torch.ones(2, 5, 2))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_start_off_leaves_the_base(kind: str) -> None:
    of_ffn, shares = DomainGate(32, NAMES, kind, "off")(torch.randn(2, 5, 32))  # type: ignore[arg-type]
    assert of_ffn is None or torch.allclose(of_ffn, torch.ones(2, 5))
    assert shares.min() > 0 and shares.max() < 0.006


def test_adding_a_domain_leaves_the_others_weights() -> None:
    x = torch.randn(2, 5, 32)
    one, two = DomainGate(32, NAMES[:1]), DomainGate(32, NAMES)
    with torch.no_grad():
        one.weight.normal_()
        two.weight[:1] = one.weight
    assert torch.allclose(one(x)[1], two(x)[1][..., :1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokens_weights_depend_on_that_token_only(kind: str) -> None:
    """Defect 3 of the released code: the gate read position -1, which in a mixed batch is padding."""
    gate, x = trained(kind), torch.randn(3, 6, 32)
    _, alone = gate(x[:1, :4])
    _, batched = gate(x)
    assert torch.allclose(alone[0], batched[0, :4], atol=1e-6)
    changed = x.clone()
    changed[:, -1] = torch.randn(3, 32)  # other padding, other company
    assert torch.allclose(gate(changed)[1][:, :-1], batched[:, :-1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_matters_to_a_gated_model(kind: str) -> None:
    """Defect 3 once more, in a model: a sequence alone, and beside a longer one with padding on either side."""
    model = tiny_model("llama")
    gated_layer(model, kind)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    short = ids[:1, :5]
    with torch.no_grad():
        want = model(short).logits
        for pad_left in (False, True):
            row = torch.full((1, 9), 0)
            place = slice(4, 9) if pad_left else slice(0, 5)
            row[:, place] = short
            mask = torch.cat([(row != 0).long(), torch.ones(1, 9, dtype=torch.long)])
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            got = model(torch.cat([row, ids[1:]]), attention_mask=mask, position_ids=positions).logits
            assert torch.allclose(got[:1, place], want, atol=1e-4)


def test_the_papers_gate_halves_the_ffn_at_its_start_and_the_default_does_not() -> None:
    """The other half of defect 3."""
    x = torch.randn(4, 32)
    of_ffn, _ = DomainGate(32, NAMES[:1], "paper").eval()(x)
    assert (of_ffn - 0.5).abs().max() < 0.1
    assert DomainGate(32, NAMES[:1])(x)[0] is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_the_weighted_sum(kind: str) -> None:
    layer = gated_layer(tiny_model("llama"), kind)
    x = torch.randn(2, 3, 32)
    of_ffn, shares = layer.gate(x)
    want = layer.base_layer(x) * (1 if of_ffn is None else of_ffn[..., None])
    for i, name in enumerate(NAMES):
        want = want + shares[..., i, None] * layer.mixda_adapters[name](x)
    assert torch.allclose(layer(x), want, atol=1e-5)
    layer.set_gate(None)
    plain = layer.base_layer(x) + sum(layer.mixda_adapters[name](x) for name in NAMES)
    assert torch.allclose(layer(x), plain, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_gate(kind: str) -> None:
    layer = gated_layer(tiny_model("llama"), kind)
    layer(torch.randn(2, 3, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.gate.parameters())


def test_bad_gates_are_refused() -> None:
    with pytest.raises(FactorMixError, match="each once"):
        DomainGate(32, ("pubmed", "pubmed"))
    with pytest.raises(FactorMixError, match="unknown gate 'top1'"):
        DomainGate(32, NAMES, "top1")  # type: ignore[arg-type]
    with pytest.raises(FactorMixError, match="start 'off' goes with"):
        DomainGate(32, NAMES, "paper", "off")
    layer = gated_layer(tiny_model("llama"), "sigmoid")
    with pytest.raises(FactorMixError, match="unknown domain of the gate 'law'"):
        layer.set_gate(DomainGate(32, ("pubmed", "law")))
