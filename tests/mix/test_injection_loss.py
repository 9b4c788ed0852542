"""L_S is what the paper says it is, L_K counts what it must, and padding changes neither."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from factormix.mix.config import OLD_KNOWLEDGE, InjectConfig
from factormix.mix.losses import OLD_LOSSES, InjectionLoss, KnowledgeLoss
from factormix.mix.peft_tuner import MixDAConfig, adapter_names
from factormix.nn import DomainFFN
from factormix.run.errors import FactorMixError
from tests.families import tiny_output
from tests.mix.adapted import FORMS, adapted, base_model

MASK = 4
MODELS = [("llama", False), ("llama", True), ("bert", False), ("albert", False), ("opt", False), ("albert", True)]
EVERY = pytest.mark.parametrize(("family", "sparse"), MODELS, ids=[f"{f}-{'sparse' * s or 'dense'}" for f, s in MODELS])


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    ids, general = tokens(), tokens(seed=1)
    whole = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "counted": torch.ones_like(ids).bool(),
        "structured": torch.tensor(False), "general_ids": general, "general_mask": torch.ones_like(general),
        "old_weight": torch.tensor(3.0),
    }  # fmt: skip
    return {**whole, **changes}


def loss_of(model: PreTrainedModel, **options: object) -> InjectionLoss:
    mask = MASK if "MaskedLM" in type(model).__name__ else None
    loss = InjectionLoss(model, "pubmed", InjectConfig(**options), mask)  # type: ignore[arg-type]
    loss.bf16 = False  # some machines have it, and it rounds
    return loss


def fresh(model: PreTrainedModel, form: str = "ffn") -> PeftModel:
    torch.manual_seed(0)
    config = MixDAConfig(**FORMS[form], layers=[0, 1], width=8)
    return get_peft_model(model, config, adapter_name="pubmed")


@EVERY
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("old", ["distil", "normalised", "paper"])
def test_old_knowledge_is_0_at_the_start_and_above_0_after_a_knowledge_step(
    family: str, sparse: bool, form: str, old: str
) -> None:
    """Defect 1 of the released code: L_S compared a tensor with itself and was 0 for ever."""
    model = base_model(family, sparse)
    wrapped = fresh(model, form).train()  # as it is trained, dropout and all
    loss = loss_of(model, old_knowledge=old)
    trained = [p for n, p in wrapped.named_parameters() if n in adapter_names(wrapped, "pubmed")]
    parts = loss(wrapped, batch())
    rounding = 1e-6 if sparse else 0.0  # without gradients a factored base runs on another operator
    assert abs(float(parts["old"].detach())) <= rounding and all(module.training for module in wrapped.modules())
    optimiser = torch.optim.SGD(trained, lr=1.0)
    parts["knowledge"].backward()
    optimiser.step()
    optimiser.zero_grad()
    after = loss(wrapped, batch())["old"]
    assert float(after.detach()) > 0
    after.backward()
    assert max(float(p.grad.abs().max()) for p in trained if p.grad is not None) > 0


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_old_knowledge_by_hand(sparse: bool) -> None:
    """mean over sites of mean_t |A(x)|^2 / mean_t |F(x)|^2, x the adapted model's own states."""
    model = base_model("llama", sparse)
    adapted(model, layers=[0, 1])
    seen: list[torch.Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, DomainFFN)]
    handles = [m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for m in layers]
    general = batch()["general_ids"]
    with torch.no_grad():
        model(general)
        for handle in handles:
            handle.remove()
        distance = [layer(x) - layer.base_layer(x) for layer, x in zip(layers, seen)]  # with less without
        base = [layer.base_layer(x) for layer, x in zip(layers, seen)]
        want = sum(d.square().sum(-1).mean() / f.square().sum(-1).mean() for d, f in zip(distance, base)) / 2
        plain = sum(d.square().mean() for d in distance) / 2
        normalised = loss_of(model, old_knowledge="normalised")
        assert torch.isclose(normalised.old(general, torch.ones_like(general)), want, rtol=1e-3)
        assert torch.isclose(
            loss_of(model, old_knowledge="paper").old(general, torch.ones_like(general)), plain, rtol=1e-3
        )


def test_every_use_of_a_shared_ffn_counts() -> None:
    model = base_model("albert")
    adapted(model)
    with torch.no_grad():
        outputs = loss_of(model, old_knowledge="normalised")._outputs(tokens(), torch.ones_like(tokens()))
    assert len(outputs) == 6 and not torch.equal(outputs[0][1], outputs[5][1])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_distance_of_outputs_by_hand(sparse: bool) -> None:
    """mean_t KL(base || adapted), the base being the same model without its adapters."""
    model = base_model("llama", sparse)
    wrapped = adapted(model, layers=[0, 1])
    general = batch()["general_ids"]
    with torch.no_grad():
        q = model(general).logits.log_softmax(-1)
        with wrapped.disable_adapter():
            p = model(general).logits.log_softmax(-1)
        want = (p.exp() * (p - q)).sum(-1).mean()
        loss = loss_of(model)
        assert torch.isclose(loss.old(general, torch.ones_like(general)), want, rtol=1e-4) and want > 1e-4
        assert torch.isclose(loss(wrapped, batch())["old"], 3 * want, rtol=1e-4)  # one micro-batch in three has it
        assert torch.isclose(model(general).logits.log_softmax(-1), q).all()  # the adapters are on again
    assert set(loss(wrapped, {k: v for k, v in batch().items() if "general" not in k})) == {"knowledge"}


def test_the_distance_of_a_masked_models_outputs_is_taken_at_masked_tokens() -> None:
    model = base_model("bert")
    adapted(model)
    ids, loss = tokens(8, 40), loss_of(model, mask=0.5)
    with torch.no_grad():
        torch.manual_seed(0)
        shown, predicted = loss.knowledge.masked(ids, torch.ones_like(ids).bool())
        with loss._without_adapters():
            p = model(shown).logits[predicted].log_softmax(-1)
        want = (p.exp() * (p - model(shown).logits[predicted].log_softmax(-1))).sum(-1).mean()
        torch.manual_seed(0)
        assert torch.isclose(loss.old(ids, torch.ones_like(ids)), want, rtol=1e-4)
        assert float(loss_of(model, mask=1e-9).old(ids, torch.ones_like(ids))) == 0.0


@pytest.mark.parametrize(
    ("family", "old"), [("llama", "distil"), ("llama", "normalised"), ("bert", "normalised"), ("albert", "normalised")]
)
def test_padding_of_general_text_is_ignored(family: str, old: str) -> None:
    model = base_model(family)
    adapted(model)
    loss, ids = loss_of(model, old_knowledge=old), tokens(1, 8)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        assert torch.isclose(loss.old(ids, torch.ones_like(ids)), loss.old(padded, mask), rtol=1e-4)
        assert not torch.isclose(loss.old(ids, torch.ones_like(ids)), loss.old(padded, torch.ones_like(padded)))


def test_the_forward_on_general_text_ends_at_the_last_adapter_and_leaves_the_model_whole() -> None:
    model = base_model("llama")
    adapted(model)  # at layer 0 of 2
    want, reached = tiny_output(model), []
    handle = model.model.layers[1].register_forward_hook(lambda *_: reached.append(1))
    with torch.no_grad():
        loss_of(model, old_knowledge="normalised").old(tokens(), torch.ones_like(tokens()))
    assert not reached
    handle.remove()
    assert torch.equal(tiny_output(model), want)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_knowledge_of_a_causal_model_is_the_next_token_over_what_counts() -> None:
    model = base_model("llama")
    wrapped = adapted(model)
    counted = torch.zeros(2, 12, dtype=torch.bool)
    counted[0, 3], counted[1, 7], counted[1, 0] = True, True, True  # nothing predicts a first token
    data = batch(counted=counted)
    with torch.no_grad():
        got = loss_of(model).knowledge(wrapped, data)
        logits, ids = model(data["input_ids"]).logits, data["input_ids"]
        want = nn.functional.cross_entropy(logits[[0, 1], [2, 6]], ids[[0, 1], [3, 7]])
    assert torch.isclose(got, want, rtol=1e-5)
    parts = loss_of(model, knowledge_weight=0.25)(wrapped, data)
    assert torch.isclose(parts["knowledge"], 0.25 * want, rtol=1e-5)
    assert set(loss_of(model, old_knowledge="none")(wrapped, data)) == {"knowledge"}


def test_masked_text_hides_15_per_cent_and_structured_knowledge_its_object() -> None:
    model = base_model("bert")
    wrapped = adapted(model)
    loss, ids = loss_of(model), tokens(40, 50)
    candidates = torch.ones_like(ids).bool()
    candidates[:, 0] = False  # [CLS]
    torch.manual_seed(0)
    shown, predicted = loss.knowledge.masked(ids, candidates)
    assert 0.12 < predicted[:, 1:].float().mean() < 0.18 and not predicted[:, 0].any()
    assert torch.equal(shown[~predicted], ids[~predicted])
    hidden = (shown == MASK)[predicted].float().mean()
    same = (shown == ids)[predicted].float().mean()
    assert 0.7 < hidden < 0.9 and 0.04 < same < 0.18
    counted = torch.zeros(2, 12, dtype=torch.bool)
    counted[0, 3:5] = counted[1, 7] = True
    data = batch(counted=counted, structured=torch.tensor(True))
    seen = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    got = loss.knowledge(wrapped, data)
    handle.remove()
    assert torch.equal(seen[0], data["input_ids"].masked_fill(counted, MASK))
    logits = model(seen[0]).logits
    assert torch.isclose(got, nn.functional.cross_entropy(logits[counted], data["input_ids"][counted]), rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_of_knowledge_is_ignored_and_a_batch_of_1_works(family: str) -> None:
    """Defect 5 of the released code at the level of the loss: batch 1 lost its dimension."""
    model = base_model(family)
    wrapped = adapted(model)
    loss, ids = loss_of(model), tokens(1, 8)
    counted = torch.zeros(1, 8, dtype=torch.bool)
    counted[0, 5] = True
    row = batch(
        input_ids=ids, attention_mask=torch.ones_like(ids), counted=counted, structured=torch.tensor(True)
    )  # fmt: skip
    extra = torch.zeros(1, 4, dtype=torch.long)
    padded = {
        **row,
        "input_ids": torch.cat([ids, extra], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), extra], 1),
        "counted": torch.cat([counted, extra.bool()], 1),
    }
    with torch.no_grad():
        assert torch.isclose(loss.knowledge(wrapped, row), loss.knowledge(wrapped, padded), rtol=1e-4)
        nothing = loss.knowledge(wrapped, {**row, "counted": torch.zeros_like(counted)})
    assert float(nothing) == 0.0


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = {}
    for on in (False, True):
        model = base_model("llama")
        wrapped = adapted(model, layers=[0, 1])
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            wrapped.train()
        parts = loss_of(model)(wrapped, batch())
        sum(parts.values()).backward()  # type: ignore[union-attr]
        gradients[on] = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all(torch.allclose(gradients[False][n], gradients[True][n], atol=1e-6) for n in gradients[False])


def test_every_form_of_the_config_is_computed_and_another_is_an_error() -> None:
    assert tuple(OLD_LOSSES) == OLD_KNOWLEDGE
    config = InjectConfig()
    object.__setattr__(config, "old_knowledge", "normalized")  # past the config's own check
    with pytest.raises(FactorMixError, match="unknown old_knowledge 'normalized'; allowed: 'distil', .*'normalised'"):
        InjectionLoss(base_model("llama", False), "pubmed", config)


def test_the_masked_share_is_the_one_given() -> None:
    model = base_model("bert", False)
    ids = tokens(40, 50)
    for share in (0.05, 0.5):
        _, predicted = KnowledgeLoss(model, MASK, share).masked(ids, torch.ones_like(ids).bool())
        assert float(predicted.float().mean()) == pytest.approx(share, abs=0.04)
