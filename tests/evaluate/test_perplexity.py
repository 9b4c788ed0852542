"""Perplexity and agreement against the arithmetic done by hand and against transformers' own loss."""

import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM

from factormix.evaluate.causal import check_next_token
from factormix.evaluate.perplexity import bootstrap_ratio, evaluate_text, evaluate_text_for
from factormix.run.errors import FactorMixError
from tests.evaluate.tiny import VOCAB


def by_hand(model, packed):
    """Sum of cross-entropies and probabilities of scored tokens, one at a time; the first has nothing before it."""
    nll, rows = 0.0, []
    for ids, scored in zip(packed.input_ids, packed.scored, strict=True):
        probabilities = model(ids[None]).logits[0].double().softmax(-1)  # (L, V)
        for at in range(1, len(ids)):
            if scored[at]:
                nll -= math.log(probabilities[at - 1, ids[at]])
                rows.append(probabilities[at - 1])
    return nll / len(rows), torch.stack(rows)


def test_equals_a_hand_computation_with_unscored_tokens(llama, windows):
    base, model, packed = llama(0), llama(1), windows(unscored=5)
    with torch.no_grad():
        base_nll, q = by_hand(base, packed)
        nll, p = by_hand(model, packed)
    score = evaluate_text(model, packed, base=base)
    assert score.tokens == 6 * 11 - 5
    assert score.model == pytest.approx(math.exp(nll), rel=1e-5)
    assert score.base == pytest.approx(math.exp(base_nll), rel=1e-5)
    assert score.ratio == pytest.approx(math.exp(nll - base_nll), rel=1e-5)
    assert score.kl == pytest.approx(float((q * (q.log() - p.log())).sum(-1).mean()), rel=1e-4)
    assert score.top1 == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()))


def test_equals_exp_of_the_loss_of_transformers(llama, windows):
    model, packed = llama(), windows()
    with torch.no_grad():
        loss = model(packed.input_ids, labels=packed.input_ids).loss  # all tokens but the first of each window
    score = evaluate_text(model, packed)
    assert score.model == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert (score.base, score.ratio, score.kl, score.top1) == (None, None, None, None)


def test_a_model_against_itself(llama, windows):
    score = evaluate_text(llama(), windows(), base=llama())
    assert score.ratio == pytest.approx(1.0, abs=1e-9)
    assert score.kl == pytest.approx(0.0, abs=1e-6)
    assert score.top1 == 1.0
    assert score.ratio_stderr == pytest.approx(0.0, abs=1e-9)


def test_batches_and_chunks_change_nothing(llama, windows, monkeypatch):
    whole = evaluate_text(llama(1), windows(7), base=llama(0), batch_size=7)
    for size in (1, 2, 4):
        assert_same(evaluate_text(llama(1), windows(7), base=llama(0), batch_size=size), whole)
    monkeypatch.setattr("factormix.evaluate.perplexity.CHUNK_BYTES", 4 * VOCAB * 5)  # five tokens at a time
    assert_same(evaluate_text(llama(1), windows(7), base=llama(0), batch_size=7), whole)


def assert_same(one, other):
    for key in ("model", "base", "ratio", "ratio_stderr", "top1", "kl", "tokens", "windows"):
        assert getattr(one, key) == pytest.approx(getattr(other, key), rel=1e-5), key


def test_several_models_at_once_are_as_one_by_one(llama, windows):
    together = evaluate_text_for({"one": llama(1), "two": llama(2)}, windows(), base=llama(0))
    assert together == {
        "one": evaluate_text(llama(1), windows(), base=llama(0)),
        "two": evaluate_text(llama(2), windows(), base=llama(0)),
    }
    assert together["one"] != together["two"]


def test_standard_error_is_paired_and_grows_with_fewer_windows(llama, windows):
    model, base = llama(1), llama(0)
    many, few = evaluate_text(model, windows(64), base=base), evaluate_text(model, windows(8), base=base)
    assert 0 < many.ratio_stderr < few.ratio_stderr < many.ratio
    assert evaluate_text(model, windows(1), base=base).ratio_stderr is None


def test_bootstrap_agrees_with_the_error_of_a_mean():
    difference = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    counts = torch.full((400,), 10)
    mean = difference / 10
    expected = float(mean.mean().exp() * mean.std() / 20)  # delta method: exp(m) x standard error of m
    assert bootstrap_ratio(difference, counts) == pytest.approx(expected, rel=0.1)
    assert bootstrap_ratio(difference, counts, seed=3) == bootstrap_ratio(difference, counts, seed=3)


def test_bfloat16_is_scored_in_float32(llama, windows):
    model = llama().bfloat16()
    with torch.no_grad():
        logits = model(windows().input_ids).logits.float()[:, :-1].reshape(-1, VOCAB)
    loss = torch.nn.functional.cross_entropy(logits, windows().input_ids[:, 1:].reshape(-1))
    assert evaluate_text(model, windows(), batch_size=6).model == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_training_mode_is_left_and_put_back(llama, windows):
    model = llama(attention_dropout=0.5).train()
    assert evaluate_text(model, windows()).model == evaluate_text(llama(), windows()).model
    assert model.training


def tiny_bert(kind, **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return kind(BertConfig(vocab_size=VOCAB, **sizes, **changes)).eval()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(BertModel, "does not predict"), (BertForMaskedLM, "does not predict"), (BertLMHeadModel, "sees the tokens")],
)
def test_encoders_are_refused_with_what_is_possible(kind, reason, windows):
    with pytest.raises(FactorMixError, match=f"{kind.__name__}. {reason}.*causal language model.*bench"):
        evaluate_text(tiny_bert(kind), windows())


def test_causal_models_pass_whatever_their_config_says(llama):
    check_next_token(tiny_bert(BertLMHeadModel, is_decoder=True))
    check_next_token(llama().bfloat16())
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    check_next_token(GPTNeoXForCausalLM(config))  # its config has is_decoder False


def test_what_cannot_be_scored_is_an_error(llama, windows):
    with pytest.raises(FactorMixError, match="vocabular|logits"):
        evaluate_text(llama(), windows(), base=llama(vocab_size=VOCAB + 3))
    with pytest.raises(FactorMixError, match="no token to score"):
        evaluate_text(llama(), windows(length=1))
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(FactorMixError, match="model is not finite"):
        evaluate_text(broken, windows(), base=llama())
