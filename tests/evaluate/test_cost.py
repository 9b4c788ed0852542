"""Parameters, bytes and FLOPs of a token against formulas written out."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AlbertConfig, AlbertForMaskedLM

from factormix.evaluate.cost import bytes_per_token, flops_per_token, parameters_per_token, weight_bytes
from factormix.nn import SparseFFN
from tests.evaluate.tiny import HIDDEN, INNER, LAYERS, VOCAB

ATTENTION = 4 * HIDDEN * HIDDEN  # q, k, v, o
FFN = 3 * HIDDEN * INNER
NORMS = (2 * LAYERS + 1) * HIDDEN
HEAD = VOCAB * HIDDEN
ROUTED = 3 * HIDDEN * INNER // 2  # four experts of the eight slices
ROUTER = 4 * HIDDEN
SAVED = LAYERS * (3 * ROUTED // 4 - ROUTER)  # three of four experts idle, the router added


def count_flops(model: nn.Module, ids: Tensor) -> int:
    """Floating-point operations of one real forward of ids (B, T), counted operator by operator by torch."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(ids)
    return int(counter.get_total_flops())


def test_flops_of_a_llama_forward_equal_the_formula(llama):
    batch, length = 3, 10
    counted = count_flops(llama(attn_implementation="eager"), torch.zeros(batch, length, dtype=torch.long))
    matrices = 2 * batch * length * (LAYERS * (ATTENTION + FFN) + HEAD)
    products = 4 * batch * length * length * HIDDEN * LAYERS  # QK^T and AV over the whole square
    assert counted == matrices + products


def test_flops_per_token_equal_the_count_but_for_attention(llama):
    model = llama(attn_implementation="eager")
    assert flops_per_token(model) == 2 * (LAYERS * (ATTENTION + FFN) + HEAD)
    assert flops_per_token(model, head=False) == 2 * LAYERS * (ATTENTION + FFN)
    assert flops_per_token(model, context=10) - flops_per_token(model) == 4 * 10 * HIDDEN * LAYERS


def test_what_a_token_reads(llama):
    model = llama()
    assert parameters_per_token(model) == LAYERS * (ATTENTION + FFN) + NORMS + HEAD  # no embedding
    assert bytes_per_token(model) == 4 * parameters_per_token(model)
    assert bytes_per_token(model.bfloat16()) == 2 * parameters_per_token(model)


def test_a_tied_head_is_read_once(llama):
    tied = llama(tie_word_embeddings=True)
    assert parameters_per_token(tied) == parameters_per_token(llama())
    assert weight_bytes(llama()) - weight_bytes(tied) == 4 * HEAD


def test_idle_experts_are_not_read(llama, sparse_llama):
    dense = llama()
    assert parameters_per_token(dense) - parameters_per_token(sparse_llama) == SAVED
    assert flops_per_token(dense) - flops_per_token(sparse_llama) == 2 * SAVED
    assert bytes_per_token(dense) - bytes_per_token(sparse_llama) == pytest.approx(4 * SAVED)


def test_the_counted_flops_of_a_sparse_forward_are_those_of_the_arithmetic(llama, sparse_llama):
    ids = torch.arange(10)[None]
    saved = count_flops(llama(), ids) - count_flops(sparse_llama, ids)
    assert saved == 10 * (flops_per_token(llama()) - flops_per_token(sparse_llama)) > 0


def test_more_tokens_leave_fewer_experts_idle(llama, sparse_llama):
    saved = [bytes_per_token(llama()) - bytes_per_token(sparse_llama, tokens=batch) for batch in (1, 2, 3)]
    assert saved == pytest.approx([4 * LAYERS * (ROUTED * 0.75**batch - ROUTER) for batch in (1, 2, 3)])
    assert bytes_per_token(llama(), tokens=3) == bytes_per_token(llama())


def test_sparse_ffns_alone_cost_what_they_cost_in_the_model(sparse_llama):
    ffns = nn.ModuleList(module for module in sparse_llama.modules() if isinstance(module, SparseFFN))
    assert bytes_per_token(ffns) == 4 * parameters_per_token(ffns) == 4 * sum(f.active_parameters() for f in ffns)


def test_a_weight_of_two_modules_is_read_once(llama):
    tied = llama()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    assert parameters_per_token(llama()) - parameters_per_token(tied) == HIDDEN * INNER


def test_shared_layers_count_once():
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=6,
    )
    model = AlbertForMaskedLM(config)
    one = sum(p.numel() for p in model.albert.encoder.albert_layer_groups.parameters())
    assert one < parameters_per_token(model) < 2 * one
