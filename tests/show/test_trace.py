"""The trace is what the model's own routers and gates chose, for each token and for no padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from factormix.data.text import Documents, read_documents
from factormix.nn import DomainFFN, SparseFFN, sites_of
from factormix.run.errors import FactorMixError
from factormix.show.trace import FFN_COLUMN, SiteTrace, record, trace
from tests.families import tiny_model
from tests.nn.sparse import sparsify
from tests.show.tiny import domain_ffn, with_domains
from tests.show.vocabularies import of_words

FAMILIES = ["llama", "llama-classify", "gpt2", "opt", "gemma3", "bert", "bert-base", "roberta-classify", "electra",
            "deberta-v2", "distilbert", "albert", "modernbert", "t5-gated", "t5-encoder"]  # fmt: skip


def sparse(family: str, layout: str = "S1A2E8") -> PreTrainedModel:
    return sparsify(tiny_model(family), layout)


def ids(batch: int = 1, length: int = 7) -> Tensor:
    return torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(1))


def by_hand(ffn: SparseFFN, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (T, R) and the K best of the states x (..., H) that came to an FFN, without its router."""
    scores = x.reshape(-1, x.shape[-1]).double() @ ffn.router.weight.double().T
    return scores.float(), scores.argsort(dim=1, descending=True)[:, : ffn.spec.active]


def watched(model: PreTrainedModel) -> list[tuple[str, SparseFFN, Tensor]]:
    """A list that fills with path, FFN and input at every use of a sparse FFN."""
    seen: list[tuple[str, SparseFFN, Tensor]] = []
    for path, module in model.named_modules():
        if isinstance(module, SparseFFN):
            module.register_forward_pre_hook(lambda m, inputs, path=path: seen.append((path, m, inputs[0].clone())))
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_what_the_routers_chose(family: str) -> None:
    model = sparse(family)
    seen = watched(model)
    found = record(model, ids(2), torch.ones(2, 7))
    assert len(found) == len(seen) >= 2 or family in ("albert",)
    paths = list(dict.fromkeys(path for path, _, _ in seen))
    in_order = sorted(seen, key=lambda use: paths.index(use[0]))  # uses of one FFN together, first to last
    assert sorted(site.path for site in found) == sorted(path for path, _, _ in in_order)
    for site in found:
        uses = [use for use in in_order if use[0] == site.path]
        use = [other.name for other in found if other.path == site.path].index(site.name)
        scores, chosen = by_hand(uses[use][1], uses[use][2])
        assert site.kind == "experts" and site.gate == "hard" and site.columns == tuple("0123456")
        assert torch.allclose(site.scores, scores, atol=1e-5)
        assert torch.equal(site.chosen, chosen)
        assert torch.equal(site.weights.sum(1), torch.full((14,), 2.0))
        assert torch.equal(site.weights.gather(1, chosen), torch.ones(14, 2))


def test_names_tell_stacks_and_uses_apart() -> None:
    names = [site.name for site in record(sparse("t5-gated"), ids(), torch.ones(1, 7))]
    assert names == ["encoder layer 0", "encoder layer 1", "decoder layer 0", "decoder layer 1"]
    shared = record(sparse("albert"), ids(), torch.ones(1, 7))
    assert [site.name for site in shared] == [f"layer 0, use {use} of 6" for use in range(1, 7)]
    assert any(not torch.equal(shared[0].chosen, other.chosen) for other in shared[1:])


PADDED = [("llama", "left"), ("llama", "right"), ("t5-encoder", "left"), ("t5-encoder", "right"), ("bert", "right"),
          ("albert", "right")]  # fmt: skip


@pytest.mark.parametrize(("family", "side"), PADDED)
def test_padding_is_left_out(family: str, side: str) -> None:
    """Only models with relative positions are padded on the left: absolute ones would count the padding."""
    model = sparse(family)
    short, long = ids(1, 4), ids(1, 7)
    mask = torch.ones(2, 7)
    batch = torch.cat([long, torch.zeros_like(long)])  # (2, 7)
    place = slice(3, None) if side == "left" else slice(None, 4)
    batch[1, place] = short[0]
    mask[1] = 0
    mask[1, place] = 1
    together = record(model, batch, mask)
    alone = [record(model, each, torch.ones_like(each)) for each in (long, short)]
    for site, first, second in zip(together, *alone, strict=True):
        assert len(site.weights) == 11
        assert torch.allclose(site.scores, torch.cat([first.scores, second.scores]), atol=1e-4)
        assert torch.equal(site.chosen, torch.cat([first.chosen, second.chosen]))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@torch.no_grad()
def test_domains_are_what_the_gate_said(kind: str) -> None:
    model = with_domains(kind=kind)
    gated = [module for module in model.modules() if isinstance(module, DomainFFN)]
    seen: list[Tensor] = []
    for ffn in gated:
        ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    found = record(model, ids(2), torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))
    assert len(found) == len(gated) == len(seen) == 2
    for site, ffn, x in zip(found, gated, seen, strict=True):
        logits = x @ ffn.gate.weight.T  # (2, 7, n or n + 1)
        want = 2 * logits.sigmoid() if kind == "sigmoid" else 3 * logits.softmax(-1)
        assert (site.kind, site.gate, site.scores, site.chosen) == ("domains", kind, None, None)
        assert site.columns == (() if kind == "sigmoid" else (FFN_COLUMN,)) + ("law", "medicine")
        assert torch.allclose(site.weights, want.reshape(14, -1)[:12], atol=1e-6)


def both() -> PreTrainedModel:
    """A sparse llama with domains beside its experts."""
    model = sparse("llama")
    for site in sites_of(model):
        layer = model.model.layers[site.index]
        layer.mlp = domain_ffn(layer.mlp, site, ("law",))
    return model.eval()


def test_a_sparse_model_with_domains_gives_both_experts_first() -> None:
    found = record(both(), ids(), torch.ones(1, 7))
    assert [(site.kind, site.name) for site in found] == [
        ("experts", "layer 0"), ("experts", "layer 1"), ("domains", "layer 0"), ("domains", "layer 1"),
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_dense_model_is_refused_with_the_remedy(family: str) -> None:
    with pytest.raises(FactorMixError, match=r"no sparse FFN with a router and no FFN with a domain gate.*factormix"):
        trace(tiny_model(family), of_words(), [read_documents(["w1"])])


def test_a_gate_without_domains_is_not_a_domain_gate() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate = nn.Linear(32, 4)  # as in a mixture of experts that is not ours
    with pytest.raises(FactorMixError, match="nothing to show"):
        record(model, ids(), torch.ones(1, 7))


def test_layers_without_a_choice_are_no_sites() -> None:
    model = sparse("llama", "S4A0E4")
    with pytest.raises(FactorMixError, match="nothing to show"):
        record(model, ids(), torch.ones(1, 7))


def test_the_model_is_as_it_was() -> None:
    model = sparse("llama").train()
    record(model, ids(), torch.ones(1, 7))
    assert model.training and all(not module._forward_hooks for module in model.modules())


def texts(*groups: list[str]) -> list[Documents]:
    return [
        Documents(f"text{i}", "text", group, [{"text": t} for t in group], "0" * 64) for i, group in enumerate(groups)
    ]


def test_every_row_is_its_tokens_own() -> None:
    model, tokenizer = sparse("bert"), of_words()
    found = trace(model, tokenizer, texts(["w1 w2 w3", "w4"], ["w5 w6"]))
    assert [token.name for token in found.tokens if token.kind != "special"] == [f"w{i}" for i in range(1, 7)]
    assert found.documents == ("text0 1", "text0 2", "text1") and found.texts == ("text0", "text0", "text1")
    assert [token.document for token in found.tokens] == [0] * 5 + [1] * 3 + [2] * 4 and found.whole
    alone: list[list[SiteTrace]] = []
    for text in ("w1 w2 w3", "w4", "w5 w6"):
        row = torch.tensor([tokenizer(text)["input_ids"]])
        alone.append(record(model, row, torch.ones_like(row)))
    for site, *parts in zip(found.sites, *alone, strict=True):
        assert torch.equal(site.scores, torch.cat([part.scores for part in parts]))
        assert torch.equal(site.chosen, torch.cat([part.chosen for part in parts]))
        assert torch.equal(site.weights, torch.cat([part.weights for part in parts]))


def test_a_text_longer_than_the_models_positions_is_read_in_windows() -> None:
    long = " ".join(f"w{i % 70}" for i in range(150))
    found = trace(sparse("bert"), of_words(), texts([long]), tokens=140)
    assert len(found.tokens) == 140 and not found.whole  # tiny bert has 64 positions
    assert sum(token.name == "[CLS]" for token in found.tokens) == 3


def test_texts_of_one_name_are_refused() -> None:
    with pytest.raises(FactorMixError, match="two texts have the name 'text0'"):
        trace(sparse("bert"), of_words(), [*texts(["w1"]), *texts(["w2"])])
