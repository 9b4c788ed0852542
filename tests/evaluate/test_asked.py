"""Which tokens are asked, and masked language models scored on them, against transformers' own loss."""

import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from factormix.data.packing import Packed, mask_token
from factormix.evaluate.asked import masked_tokens, next_tokens
from factormix.evaluate.perplexity import evaluate_text, evaluate_text_for
from factormix.evaluate.suite import evaluate
from factormix.run.errors import FactorMixError
from tests.evaluate.tiny import VOCAB
from tests.families import TINY, tiny_model

MASK = 4
MASKED = [family for family, tiny in TINY.items() if "MaskedLM" in tiny.model.__name__]


@pytest.fixture
def bert():
    def build(seed: int = 0, kind=BertForMaskedLM):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return kind(BertConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes)).eval()

    return build


def test_the_next_token_is_asked_where_it_is_scored(windows):
    packed = windows(2, length=5, unscored=1)
    packed.scored[:, 0] = True  # as where nothing opens a window
    asked = next_tokens(packed)
    assert asked.where.tolist() == [[True, True, True, True, False], [True, True, True, False, False]]
    assert torch.equal(asked.wanted[0, :4], packed.input_ids[0, 1:]) and torch.equal(asked.shown, packed.input_ids)


def test_masked_tokens_are_hidden_text_and_the_same_each_time(windows):
    packed = windows(64, length=40, unscored=20)
    asked = masked_tokens(packed, MASK)
    assert bool(packed.scored[asked.where].all()) and bool((asked.shown[asked.where] == MASK).all())
    assert torch.equal(asked.shown[~asked.where], packed.input_ids[~asked.where])
    assert torch.equal(asked.wanted, packed.input_ids)
    assert abs(float(asked.where.sum() / packed.scored.sum()) - 0.15) < 0.03
    assert torch.equal(masked_tokens(packed, MASK).where, asked.where)
    assert not torch.equal(masked_tokens(packed, MASK, seed=1).where, asked.where)


def test_equals_exp_of_the_masked_loss_of_transformers(bert, windows):
    asked = masked_tokens(windows(8, length=20), MASK)
    labels = asked.wanted.masked_fill(~asked.where, -100)
    with torch.no_grad():
        loss, base_loss = (float(bert(seed)(asked.shown, labels=labels).loss) for seed in (1, 0))
    score = evaluate_text(bert(1), asked, base=bert(0))
    assert score.tokens == int(asked.where.sum())
    assert score.model == pytest.approx(math.exp(loss), rel=1e-5)
    assert score.ratio == pytest.approx(math.exp(loss - base_loss), rel=1e-5)
    assert score.kl is not None and score.kl > 0.01


@pytest.mark.parametrize("family", MASKED)
def test_every_masked_language_model_is_scored(family):
    model = tiny_model(family)
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    scored = torch.ones_like(ids, dtype=torch.bool)
    asked = masked_tokens(Packed(ids, scored, ids.numel(), "0" * 64), MASK)
    score = evaluate_text(model, asked, base=model)
    assert score.tokens == int(asked.where.sum()) and score.model > 1 and score.ratio == pytest.approx(1.0)


def test_the_verdict_says_what_was_predicted(bert, llama, windows):
    packed = windows(4, length=30)
    assert evaluate(bert(), bert(), {"t": masked_tokens(packed, MASK)}).to_dict()["predicts"] == "masked"
    assert evaluate(llama(), llama(), {"t": packed}).to_dict()["predicts"] == "next"


def test_what_cannot_be_asked_is_an_error(bert, llama, windows):
    asked = masked_tokens(windows(4, length=30), MASK)
    with pytest.raises(FactorMixError, match="LlamaForCausalLM. does not see what follows.*next token"):
        evaluate_text(llama(), asked)
    with pytest.raises(FactorMixError, match="base .BertModel. does not predict masked tokens"):
        evaluate_text_for({"model": bert()}, asked, base=bert(kind=BertModel))
    with pytest.raises(FactorMixError, match="BertForMaskedLM.*no mask token"):
        mask_token(None, bert())
    with pytest.raises(FactorMixError, match="no token was masked of 11"):
        masked_tokens(windows(1), MASK, share=0.0)
