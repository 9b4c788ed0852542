"""Own gates: an adapter speaks on its own domain's text and nowhere else, alone and beside others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from factormix import FactorMixError
from factormix.data.packing import Packed
from factormix.mix.adapt_config import AdaptConfig
from factormix.mix.adapter_files import save_adapter
from factormix.mix.batches import Stage1Batches
from factormix.mix.gated import open_adapters
from factormix.mix.load import load_mix, save_mix
from factormix.mix.own_gate import _separate, fit_own_gate
from factormix.mix.qwen2_moe import to_qwen2_moe
from factormix.mix.task import Task
from tests.families import VOCAB, tiny_model, tiny_output
from tests.mix.adapted import adapted, base_model
from tests.mix.toy import mix

DOMAIN, GENERAL = (3, VOCAB // 2), (VOCAB // 2, VOCAB)  # token ids of either side


def words(low: int, high: int, seed: int = 0, count: int = 32) -> Packed:
    """Windows (count, 16) of random tokens from `low` to `high`."""
    ids = torch.randint(low, high, (count, 16), generator=torch.Generator().manual_seed(seed))
    return Packed(ids, torch.ones_like(ids, dtype=torch.bool), ids.numel(), "words")


def text(domain: tuple[int, int] = DOMAIN, general: tuple[int, int] = GENERAL) -> Stage1Batches:
    return Stage1Batches(words(*domain), [], words(*general, seed=1), 16)


def made(folder: Path, model: PreTrainedModel, domain: str = "pubmed", **options: object) -> Path:
    """A random adapter's directory with its own gate; reviews is the domain of the other half of the tokens."""
    wrapped = adapted(model, domain, **options)  # type: ignore[arg-type]
    sides = text() if domain == "pubmed" else text(GENERAL, DOMAIN)
    save_adapter(wrapped, domain, folder / domain, gates=fit_own_gate(wrapped, domain, sides, 512))
    return folder / domain


def shares(model: torch.nn.Module, gates: dict, ids: Tensor) -> Tensor:
    """Mean weight of each domain at the first gate."""
    seen: list[Tensor] = []
    handle = next(iter(gates.values())).register_forward_hook(lambda _, __, out: seen.append(out[1].flatten(0, -2)))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return torch.cat(seen).mean(0)  # (n,)


def test_separate_gives_one_to_the_domain_and_nothing_to_the_rest() -> None:
    draw = torch.Generator().manual_seed(0)
    away = torch.zeros(8)
    away[2] = 4.0
    away[5] = 8.0  # what all inputs have in common stands in for a bias; any real FFN's input has that
    domain = torch.randn(300, 8, generator=draw) + away
    away[2] = -4.0
    general = torch.randn(900, 8, generator=draw) + away
    w = _separate(domain, general)
    of_domain, of_general = ((2 * (x.double() @ w).sigmoid()).mean() for x in (domain, general))
    assert abs(of_domain - 1) < 0.05 and of_general < 0.05
    # the minimum of what the module's text says: moving away in any direction raises it
    x, side = torch.cat([domain, general]).double(), torch.cat([torch.full((300,), 0.5), torch.zeros(900)]).double()

    def loss(at: Tensor) -> float:
        each = torch.nn.functional.binary_cross_entropy_with_logits(x @ at, side, reduction="none")
        squares = (domain.double().square().mean() + general.double().square().mean()) / 2
        return float((each[:300].mean() + each[300:].mean()) / 2 + 1e-3 / 2 * squares * at.square().sum())

    for _ in range(20):
        direction = torch.randn(8, generator=draw).double()
        assert loss(w) < loss(w + 1e-3 * direction)
    # sides of unlike size weigh the same
    twice = _separate(domain, torch.cat([general, general]))
    assert torch.allclose(w, twice, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "bert", "albert", "modernbert"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_gate_tells_its_domain_apart_and_leaves_the_model(family: str, sparse: bool) -> None:
    wrapped = adapted(base_model(family, sparse))
    wrapped.train()
    before, trains = wrapped.state_dict(), {n for n, p in wrapped.named_parameters() if p.requires_grad}
    before = {name: tensor.clone() for name, tensor in before.items()}
    gates = fit_own_gate(wrapped, "pubmed", text(), 512)
    assert list(gates) == [0] and not any(p.requires_grad for p in gates[0].parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.state_dict().items())
    assert wrapped.get_base_model().training
    assert {n for n, p in wrapped.named_parameters() if p.requires_grad} == trains
    assert not any(module._forward_pre_hooks for module in wrapped.modules() if hasattr(module, "mixda_adapters"))
    wrapped.eval()
    layer = next(module for module in wrapped.modules() if hasattr(module, "mixda_adapters"))
    layer.set_gate(gates[0])
    own, other = (shares(wrapped, gates, words(*side, seed=5).input_ids) for side in (DOMAIN, GENERAL))
    assert own > 1.3 * other, (own, other)  # random states have little in common, so no more can be asked


def test_padding_does_not_count() -> None:
    plain = {"input_ids": words(*DOMAIN).input_ids, "structured": torch.tensor(True)}
    ids = torch.nn.functional.pad(plain["input_ids"], (0, 9), value=7)  # (32, 25)
    mask = torch.nn.functional.pad(torch.ones(32, 16, dtype=torch.int64), (0, 9))  # (32, 25)
    rows = []
    for fact in (
        {**plain, "attention_mask": torch.ones(32, 16, dtype=torch.int64)},
        {"input_ids": ids, "attention_mask": mask},
    ):
        batches = Stage1Batches(None, [fact], words(*GENERAL, seed=1), 16)
        rows.append(fit_own_gate(adapted(tiny_model("llama")), "pubmed", batches, 512)[0].weight)
    assert torch.allclose(*rows, atol=1e-4)  # type: ignore[arg-type]


def test_own_gates_stand_side_by_side_whatever_the_order(tmp_path: Path) -> None:
    folders = {name: made(tmp_path, tiny_model("llama"), name, seed=i) for i, name in enumerate(("pubmed", "reviews"))}
    assert PeftModel.from_pretrained(tiny_model("llama"), str(folders["pubmed"]))  # still PEFT's directory
    model = tiny_model("llama")
    gates = open_adapters(model, folders, "own")
    half, other = (shares(model, gates, words(*side, seed=5).input_ids) for side in (DOMAIN, GENERAL))
    assert half[0] > 1.3 * half[1] and other[1] > 1.3 * other[0]
    turned = tiny_model("llama")
    open_adapters(turned, dict(reversed(folders.items())), "own")
    assert torch.allclose(tiny_output(turned), tiny_output(model), atol=1e-6)
    alone = tiny_model("llama")
    (gate,) = open_adapters(alone, {"pubmed": folders["pubmed"]}, "own").values()
    assert torch.equal(gate.weight[0], gates[0].weight[0])  # type: ignore[index]
    same = tiny_model("llama")
    open_adapters(same, {"pubmed": folders["pubmed"]}, folders["pubmed"] / "gate")
    assert torch.equal(tiny_output(same), tiny_output(alone))


def test_stage_2_starts_from_own_gates(tmp_path: Path) -> None:
    folders = {name: made(tmp_path, tiny_model("llama"), name, seed=i) for i, name in enumerate(("pubmed", "reviews"))}
    started, opened = mix(tiny_model("llama"), folders, start="own"), tiny_model("llama")
    gates = open_adapters(opened, folders, "own")
    assert torch.equal(started.gates[0].weight, gates[0].weight)  # type: ignore[arg-type]
    assert any(".gate." in name for name in started.trained)
    save_mix(started, Task("single-label", ["a", "b", "c"], pooling="last"), folders, tmp_path / "mix")
    again, _ = load_mix(tmp_path / "mix", tiny_model("llama"))
    ids = words(*DOMAIN, seed=5).input_ids
    assert torch.equal(again(ids, torch.ones_like(ids)), started(ids, torch.ones_like(ids)))
    with pytest.raises(FactorMixError, match="'own' goes with gate_kind 'sigmoid', not 'softmax'"):
        AdaptConfig(gate_kind="softmax", gate_start="own")


def test_one_domain_under_its_own_gate_is_a_qwen2_moe(tmp_path: Path) -> None:
    folder = made(tmp_path, tiny_model("llama"))
    model = tiny_model("llama")
    open_adapters(model, {"pubmed": folder}, "own")
    stock, _ = to_qwen2_moe(tiny_model("llama"), {"pubmed": folder}, "own")
    want = tiny_output(model)
    assert (tiny_output(stock) - want).norm() / want.norm() < 1e-5


def test_what_has_no_gate_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, tiny_model("llama"))
    other = made(tmp_path / "other", tiny_model("llama"), seed=1)
    shutil.copy(other / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(FactorMixError, match="was fitted for weights with SHA-256 .* Copy the directory whole"):
        open_adapters(tiny_model("llama"), {"pubmed": folder}, "own")
    shutil.rmtree(folder / "gate")
    with pytest.raises(FactorMixError, match="has no gate of its own, because .*--gate-tokens 0"):
        open_adapters(tiny_model("llama"), {"pubmed": folder}, "own")
