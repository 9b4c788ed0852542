"""What a sparse model is timed beside computes what it says, and shares its weights."""

import pytest
import torch

from factormix.evaluate.companions import COMPANIONS, active_width, companion, stock_experts
from factormix.evaluate.cost import flops_per_token, weight_bytes
from factormix.evaluate.shapes import SHAPES, random_llamas, random_models
from factormix.nn import Layout, SparseFFN
from factormix.run.errors import FactorMixError
from tests.evaluate.tiny import HIDDEN, LAYERS, VOCAB
from tests.families import tiny_model
from tests.nn.sparse import sparsify

INNER = 64  # experts of 8 neurons: grouped_mm wants rows of whole 16 bytes
IDS = torch.arange(3, 15)[None]


@pytest.fixture
def pair(llama):
    return random_llamas(llama(intermediate_size=INNER).config, Layout(4, 1, 8), torch.float32, 0)


@torch.no_grad()
def test_the_active_width_is_the_dense_model_of_its_first_neurons(pair):
    dense, sparse = pair
    cut = active_width(sparse, dense)
    keep = INNER * 5 // 8
    for layer in dense.model.layers:  # the same by masking, in the dense model itself
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args: (args[0] * (torch.arange(INNER) < keep),), with_kwargs=False
        )
    assert torch.allclose(cut(IDS).logits, dense(IDS).logits, atol=1e-5)
    assert flops_per_token(dense) - flops_per_token(cut) == 2 * LAYERS * 3 * HIDDEN * (INNER - keep)
    assert cut.get_input_embeddings().weight is dense.get_input_embeddings().weight
    assert dense.model.layers[0].mlp.up_proj.weight.shape == (INNER, HIDDEN)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_stock_experts_compute_the_same_with_the_same_tensors(pair, implementation):
    _, sparse = pair
    stock = stock_experts(sparse, implementation)
    assert torch.allclose(stock(IDS).logits, sparse(IDS).logits, atol=1e-4)
    assert torch.allclose(stock(IDS[:, :1]).logits, sparse(IDS[:, :1]).logits, atol=1e-4)
    assert {id(p) for p in stock.parameters()} == {id(p) for p in sparse.parameters()}
    assert "transformers" in type(stock.model.layers[0].mlp.experts.stock).__module__


def test_stock_experts_do_run(pair, monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ran = []
    own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *a: ran.append(1) or own(*a))
    for tokens in (1, 12):
        with torch.no_grad():
            stock_experts(pair[1], "grouped_mm")(IDS[:, :tokens])
    assert len(ran) == 2 * LAYERS


def test_what_cannot_stand_beside_is_refused(pair, sparse_llama):
    dense, sparse = pair
    with pytest.raises(FactorMixError, match="no sparse FFN"):
        companion(COMPANIONS[0], dense, dense)
    with pytest.raises(FactorMixError, match="--against"):
        companion("active-width", sparse, None)
    with pytest.raises(FactorMixError, match="have a gate and no bias"):
        companion("transformers-eager", sparsify(tiny_model("gpt2")), None)


def test_random_models_have_the_shape_and_share_all_but_the_ffns(pair):
    dense, sparse = pair
    ours, theirs = (dict(model.named_parameters()) for model in (sparse, dense))
    assert all(ours[name] is theirs[name] for name in ours if ".mlp." not in name)
    ffns = [module for module in sparse.modules() if isinstance(module, SparseFFN)]
    assert [ffn.spec.layout for ffn in ffns] == [Layout(4, 1, 8)] * LAYERS
    router = 4 * HIDDEN * 4  # four scores, float32
    assert weight_bytes(sparse) - weight_bytes(dense) == LAYERS * router
    assert all(torch.isfinite(p).all() and p.std() > 0 for n, p in ours.items() if "norm" not in n)
    assert sparse(IDS).logits.shape == (1, 12, VOCAB)
    with torch.device("meta"):
        for name, parameters in (("tinyllama", 1_100_048_384), ("smollm2-135m", 134_515_008)):
            assert random_models(name, Layout(4, 4, 16))[0].num_parameters() == parameters
    with pytest.raises(FactorMixError, match="Did you mean 'tinyllama'"):
        random_models("tinylama", Layout(4, 4, 16))
    assert set(SHAPES) == {"tinyllama", "smollm2-135m"}
