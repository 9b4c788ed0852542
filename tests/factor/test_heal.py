"""Healing: the loss's parts, that gradients reach the router, that only sparse FFNs train, resume, NaN."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from factormix import FactorMixError
from factormix.factor.config import FactorConfig, HealConfig
from factormix.factor.factorize import factorize, work_directory
from factormix.factor.heal import LR, ROUTER_LR, HealingLoss, heal, peak_rates
from factormix.factor.losses import hidden_distance
from factormix.nn.rms import rms
from factormix.run.workdir import WorkDirectory
from factormix.train import distillation
from factormix.train.loop import last_checkpoint
from tests.factor.test_factorize import QUICK, windows
from tests.families import tiny_model

STEPS = HealConfig(tokens=256, batch_tokens=64, lr=1e-3, save_steps=2)


def pair(layer_fit: bool = False) -> tuple[PreTrainedModel, PreTrainedModel]:
    dense = tiny_model("llama")
    config = FactorConfig.parse("S1A1E4", layer_fit=layer_fit, **QUICK)
    return factorize(dense, config, windows(), quiet=True), dense


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    text = windows(rows, seed=5)
    return {"input_ids": text.input_ids, "scored": text.scored}


def test_with_pa_weight_0_the_logits_kl_alone_reaches_every_router() -> None:
    sparse, dense = pair()
    sparse.train()
    parts = HealingLoss(sparse, dense, HealConfig(kl=1, pa=0), "joint", "pa")(sparse, batch())
    assert set(parts) == {"kl"}
    parts["kl"].backward()
    for ffn in sparse.sparse_ffns().values():
        assert ffn.router.weight.grad.abs().max() > 0


def test_each_part_has_its_weight_and_value() -> None:
    sparse, dense = pair()
    config = HealConfig(kl=0.5, ce=2.0, pa=0.05, balance=0.01)
    loss = HealingLoss(sparse, dense, config, "joint", "pa")
    with loss.watching(), torch.no_grad():
        parts = loss(sparse, batch())
    ids, scored = batch()["input_ids"], batch()["scored"]
    with torch.no_grad():
        log_q = sparse(input_ids=ids).logits[:, :-1][scored[:, 1:]].log_softmax(-1)
    expected = -2.0 * log_q.gather(1, ids[:, 1:][scored[:, 1:]].unsqueeze(1)).mean()
    assert torch.allclose(parts["ce"], expected, atol=1e-5)
    assert parts["kl"] > 0 and parts["pa"] > 0 and 0.01 * 0.9 < parts["balance"] < 0.01 * 3


def test_the_kl_is_zero_between_a_model_and_itself() -> None:
    dense = tiny_model("llama")
    parts = HealingLoss(dense, dense, HealConfig(), "joint", "pa")(dense, batch())
    assert parts["kl"].abs() < 1e-2  # teacher and student may compute in different precision


def test_every_sample_of_a_batch_counts() -> None:
    sparse, dense = pair()
    loss = HealingLoss(sparse, dense, HealConfig(), "joint", "pa")
    both = batch(2)
    with torch.no_grad():
        apart = [loss(sparse, {k: v[i : i + 1] for k, v in both.items()})["kl"] for i in range(2)]
        together = loss(sparse, both)["kl"]
    assert apart[0] != apart[1] and torch.allclose(together, (apart[0] + apart[1]) / 2, rtol=1e-2)


def test_healing_lowers_the_loss_and_trains_sparse_ffns_only() -> None:
    sparse, dense = pair()
    before = {name: p.clone() for name, p in sparse.named_parameters()}
    teacher = {name: p.clone() for name, p in dense.named_parameters()}
    judge = HealingLoss(sparse, dense, HealConfig(), "joint", "pa")  # the steps' own losses are of different windows
    with torch.no_grad():
        kl = float(judge(sparse, batch(8))["kl"])
    done = heal(sparse, dense, windows(64), STEPS.replace(tokens=2048, lr=5e-3, save_steps=100), quiet=True)
    for name, parameter in sparse.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (".mlp." in name), name
        assert parameter.requires_grad
    assert all(torch.equal(p, teacher[name]) for name, p in dense.named_parameters())
    with torch.no_grad():
        assert float(judge(sparse, batch(8))["kl"]) < 0.95 * kl
    assert done["tokens"] == 2048 and done["metrics"]["lr"] == [5e-3, 5e-3]
    routers = [rms(p) for name, p in before.items() if ".router." in name]
    assert done["metrics"]["router_lr"] == pytest.approx([ROUTER_LR * min(routers), ROUTER_LR * max(routers)])
    assert done["params_trained"] == sum(p.numel() for n, p in sparse.named_parameters() if ".mlp." in n)


@pytest.mark.parametrize(("layout", "share"), [("S1A1E8", 1.0), ("S1A1E4", 1.0), ("S1A2E4", 0.5), ("S2A2E4", 0.1)])
def test_rates_left_open_fall_where_little_is_to_mend(layout: str, share: float) -> None:
    config = FactorConfig.parse(layout, layer_fit=False, allocation="uniform", **QUICK)
    sparse = factorize(tiny_model("llama"), config, windows(), quiet=True)
    named = dict(sparse.named_parameters())
    found = peak_rates(sparse, HealConfig())
    assert found.keys() == {name for name in named if ".mlp." in name}
    for name, rate in found.items():
        assert rate == pytest.approx(share * (ROUTER_LR if "router" in name else LR) * rms(named[name]))
    given = peak_rates(sparse, HealConfig(lr=0.5, router_lr=0.25))
    assert all(rate == (0.25 if "router" in name else 0.5) for name, rate in given.items())


def test_a_rate_left_open_is_a_fraction_of_the_weights_whatever_their_size() -> None:
    """At one absolute rate, healing took a model of small weights apart (Gemma-3-270m: KL 0.5 to 1.2 nats)."""
    sparse, _ = pair()
    before = peak_rates(sparse, HealConfig())
    ffn = next(iter(sparse.sparse_ffns().values()))
    with torch.no_grad():
        ffn.experts.down_proj.mul_(0.1)
        ffn.router.weight.zero_()
    after = peak_rates(sparse, HealConfig())
    changed = {name: after[name] / rate for name, rate in before.items() if after[name] != rate}
    (down,), (router,) = ([n for n in changed if part in n] for part in ("experts.down_proj", "router"))
    assert len(changed) == 2 and changed[down] == pytest.approx(0.1) and after[router] > 0  # zero must not stay


OTHER_HEADS = {
    "bert": "kl", "albert": "kl", "distilbert": "kl", "modernbert": "kl", "t5-gated": "kl",
    "bert-base": "hidden", "bert-classify": "hidden", "t5-encoder": "hidden",
}  # fmt: skip


@pytest.mark.parametrize("family", OTHER_HEADS)
def test_models_that_are_not_causal_heal_too(family: str) -> None:
    dense = tiny_model(family)
    sparse = factorize(
        dense, FactorConfig.parse("S1A1E4", layer_fit=False, allocation="uniform", **QUICK), windows(), quiet=True
    )
    config = STEPS.replace(tokens=4096, lr=5e-4, router_lr=1e-3, kl=10.0, pa=0.1, balance=0.01, save_steps=100)
    loss, part = HealingLoss(sparse, dense, STEPS, "joint", "pa"), OTHER_HEADS[family]
    loss.bf16 = False  # the teacher's rounding is as large as what is left of the smallest of these
    with torch.no_grad():
        before = loss(sparse, batch(16))[part]
    history = heal(sparse, dense, windows(64), config, quiet=True)["metrics"]["history"]
    assert set(history[0]) == {"step", part, "pa", "balance"}
    with torch.no_grad():
        after = loss(sparse, batch(16))[part]
    assert 0 < after < 0.98 * before


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_kl_counts_the_positions_that_predict_text(family: str) -> None:
    """A masked model's logits at a position are about that token, a causal one's about the next."""
    dense = tiny_model(family)
    sparse = factorize(dense, FactorConfig.parse("S1A1E4", layer_fit=False, **QUICK), windows(), quiet=True)
    loss = HealingLoss(sparse, dense, STEPS, "joint", "pa")
    loss.bf16 = False
    part = batch()
    part["scored"] = torch.arange(16).expand(2, -1) % 3 == 0
    with torch.no_grad():
        student, teacher = (m(input_ids=part["input_ids"]).logits for m in (sparse, dense))
        got = loss(sparse, part)["kl"]
    at = part["scored"] if family == "bert" else part["scored"].roll(-1, 1)  # 15 wraps round to 0
    at[:, -1] &= family == "bert"
    assert torch.allclose(got, distillation(student, teacher, at), rtol=1e-4)


def test_the_distance_of_hidden_states_is_relative_and_counts_no_padding() -> None:
    teacher = torch.randn(2, 5, 8)
    counted = torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(hidden_distance(1.5 * teacher, teacher, counted), torch.tensor(0.25))
    counted[:, 3:] = False
    moved = teacher.clone()
    moved[:, 3:] += 100
    assert hidden_distance(moved, teacher, counted) == 0


def test_ce_is_refused_where_nothing_predicts_the_next_token() -> None:
    dense = tiny_model("bert-base")
    sparse = factorize(dense, FactorConfig.parse("S1A1E4", layer_fit=False, **QUICK), windows(), quiet=True)
    with pytest.raises(FactorMixError, match="ce 1.0 needs a model that predicts the next token; FactorMixBertModel"):
        heal(sparse, dense, windows(), STEPS.replace(ce=1.0), quiet=True)


def test_a_killed_healing_goes_on_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    text = windows(64)
    straight, dense = pair()
    heal(straight, dense, text, STEPS, quiet=True)
    sparse, dense = pair()
    work = WorkDirectory(tmp_path / "w", {})
    original = HealingLoss.__call__
    calls = []

    def dies(self: HealingLoss, model: torch.nn.Module, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) > 12:  # four windows a step: in step 4 of 4
            raise KeyboardInterrupt
        return original(self, model, part)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HealingLoss, "__call__", dies)
        heal(sparse, dense, text, STEPS, work=work, quiet=True)
    torn = tmp_path / "w" / "healing" / "checkpoint-3"  # a save that was killed half-way
    torn.mkdir()
    assert last_checkpoint(tmp_path / "w" / "healing") == str(tmp_path / "w" / "healing" / "checkpoint-2")
    again, dense = pair()
    done = heal(again, dense, text, STEPS, work=WorkDirectory(tmp_path / "w", {}), quiet=True)
    assert [row["step"] for row in done["metrics"]["history"]] == [3, 4]
    for (name, a), (_, b) in zip(straight.named_parameters(), again.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_nan_in_the_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    sparse, dense = pair()
    original, calls = HealingLoss.__call__, []

    def poisoned(self: HealingLoss, model: torch.nn.Module, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        parts = original(self, model, part)
        return {"kl": parts["kl"] * float("nan")} if len(calls) > 12 else parts

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FactorMixError, match="loss became nan at step 3"):
        patch.setattr(HealingLoss, "__call__", poisoned)
        heal(sparse, dense, windows(64), STEPS, work=WorkDirectory(tmp_path / "w", {}), quiet=True)
    assert last_checkpoint(tmp_path / "w" / "healing") is not None


def test_impossible_healing_is_refused() -> None:
    sparse, dense = pair()
    with pytest.raises(FactorMixError, match="no sparse FFN"):
        heal(dense, dense, windows(), STEPS, quiet=True)
    with pytest.raises(FactorMixError, match="all 0"):
        heal(sparse, dense, windows(), STEPS.replace(kl=0.0), quiet=True)
    with pytest.raises(FactorMixError, match="less than one step"):
        heal(sparse, dense, windows(), STEPS.replace(tokens=32), quiet=True)


def test_factorize_heals_when_asked(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    config = FactorConfig.parse("S1A1E4", heal=STEPS, **QUICK)
    work = work_directory(tmp_path / "out", config, {})
    sparse = factorize(dense, config, windows(), healing=windows(64), work=work, quiet=True)
    assert sparse.config.factormix["made_by"]["healing"]["tokens"] == 256


def test_routers_cannot_be_trained_where_there_are_none_and_whole_ffns_are_left_out() -> None:
    dense = tiny_model("llama")
    static = factorize(dense, FactorConfig.parse("S2A0E4", layer_fit=False, **QUICK), windows(), quiet=True)
    with pytest.raises(FactorMixError, match="pa 0.1 .*has none"):
        heal(static, dense, windows(), STEPS.replace(pa=0.1), quiet=True)
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.mul_(0.05)  # so the first FFN runs whole
    sparse = factorize(dense, FactorConfig.parse("S3A3E8", layer_fit=False, **QUICK), windows(), quiet=True)
    assert [ffn.router is None for ffn in sparse.sparse_ffns().values()] == [True, False]
    history = heal(sparse, dense, windows(), STEPS.replace(pa=0.1), quiet=True)["metrics"]["history"]
    assert history[0]["pa"] > 0
