"""The stage-2 model: what it is at the start, that padding never matters, that exactly the trained set trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factormix import FactorMixError
from factormix.mix import mix_model
from factormix.mix.adapt_config import TASK_ADAPTERS
from factormix.mix.adapter_files import load_adapters
from factormix.mix.gate_means import GateMeans
from factormix.mix.mix_model import MixModel
from factormix.mix.peft_tuner import trainable_names
from factormix.mix.task_adapters import TaskAdapterSpec
from factormix.nn import DomainFFN
from tests.families import TINY, tiny_inputs, tiny_model, tiny_output
from tests.mix.toy import FAMILIES, disturb, domains, mix, padded

ADAPTERS = ("pfeiffer", "houlsby", "lora", "none")
ROWS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
FAMILY = pytest.mark.parametrize("family", FAMILIES)
WITHOUT_LORA = {"albert", "modernbert"}  # PEFT names no projections for them


def kinds(family: str) -> list[str]:
    more = ["prefix"] if family in ("llama", "gpt2") else []
    return [kind for kind in (*ADAPTERS, *more) if kind != "lora" or family not in WITHOUT_LORA]


EACH = pytest.mark.parametrize(("family", "kind"), [(f, k) for f in FAMILIES for k in kinds(f)])


@FAMILY
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby", "none"])
def test_at_the_start_the_domain_adapted_model_is_unchanged(family: str, gate: str, kind: str, tmp_path: Path) -> None:
    """Part of defect 3: at its start the released softmax gate halved the FFN."""
    folders = domains(family, tmp_path)
    ungated = tiny_model(family)
    load_adapters(ungated, folders)
    want = tiny_output(ungated)
    assert (want - tiny_output(tiny_model(family))).abs().max() > 1e-4
    model = mix(tiny_model(family), folders, kind, gate=gate)
    assert torch.allclose(tiny_output(model.model), want, atol=1e-6)
    if gate == "sigmoid":
        assert torch.equal(tiny_output(model.model), want)


@EACH
@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "paper"])
def test_a_tokens_gate_weights_do_not_depend_on_its_batch(family: str, kind: str, gate: str, tmp_path: Path) -> None:
    """Defect 3: the released gate read the last position, which is padding in a mixed batch."""
    model = mix(tiny_model(family), domains(family, tmp_path), kind, gate=gate)
    disturb(model)
    seen: list[torch.Tensor] = []
    (of_site,) = model.gates.values()
    of_site.register_forward_hook(lambda _, inputs, output: seen.append(output[1].reshape(-1, 2)))

    def weights(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Of each row, its own tokens at every use of the site: (uses, length, 2)."""
        seen.clear()
        with torch.no_grad():
            model(ids, mask)
        whole = torch.stack([each.view(*ids.shape, 2) for each in seen])  # (uses, N, L, 2)
        return [whole[:, i, : len(row)] for i, row in enumerate(rows)]

    rows = ROWS
    together = weights(*padded(ROWS))
    longer = weights(*padded(ROWS, extra=4))
    left = weights(*padded(ROWS, side="left", extra=2))
    for i, row in enumerate(ROWS):
        rows = [row]
        (alone,) = weights(*padded([row]))
        assert alone.std() > 1e-3  # the gate does say something
        for other in (together[i], longer[i], left[i]):
            assert torch.allclose(other, alone, atol=1e-5)


@EACH
@pytest.mark.parametrize("pooling", ["last", "mean", "first"])
def test_padding_never_matters(family: str, kind: str, pooling: str, tmp_path: Path) -> None:
    """With defect 5: a batch of one keeps its shape."""
    model = mix(tiny_model(family), domains(family, tmp_path), kind, pooling=pooling)
    disturb(model)
    with torch.no_grad():
        alone = torch.cat([model(*padded([row])) for row in ROWS])  # (3, 3)
        assert alone.shape == (3, 3) and model(*padded(ROWS[:1])).shape == (1, 3)
        for side in ("left", "right"):
            assert torch.allclose(model(*padded(ROWS, side, 3)), alone, atol=1e-5)


@EACH
def test_exactly_the_trained_set_trains(family: str, kind: str, tmp_path: Path) -> None:
    model = mix(tiny_model(family), domains(family, tmp_path), kind)
    assert trainable_names(model) == set()
    parts = {"prefix": "task_adapter.encoder", "lora": ".lora_", "none": ".gate."}
    for name in model.trained:
        allowed = (".gate.", "head.", parts.get(kind, "task_adapter.after."))
        assert any(part in name for part in allowed) and "mixda_adapters" not in name, name
    assert {n.split(".")[0] for n in model.trained} >= {"model", "head"}
    if kind != "none":
        assert any(parts.get(kind, "task_adapter.after.") in name for name in model.trained)
    model.set_trainable(True)
    assert trainable_names(model) == model.trained
    with model.disabled():
        assert trainable_names(model) == model.trained
    assert trainable_names(model) == model.trained
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in model.trained}
    disturb(model)
    model(*padded(ROWS)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in model.trained), name
        assert name in model.trained or torch.equal(parameter, frozen[name])


@EACH
def test_disabled_is_the_base_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    want = tiny_output(tiny_model(family))
    model = mix(tiny_model(family), domains(family, tmp_path), kind)
    disturb(model)
    with model.disabled() as base:
        assert torch.equal(tiny_output(base), want)
    before = model(*padded(ROWS))
    with model.disabled():
        assert not torch.allclose(model(*padded(ROWS)), before)
    assert torch.equal(model(*padded(ROWS)), before)


@pytest.mark.parametrize("kind", kinds("llama"))
def test_generate_keeps_the_trained_set(kind: str, tmp_path: Path) -> None:
    model = mix(tiny_model("llama"), domains("llama", tmp_path), kind, outputs=0)
    disturb(model)
    ids, mask = padded([[5, 6, 7]])
    model.set_trainable(True)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 7) and trainable_names(model) == model.trained
    # the same tokens one forward at a time, without a cache
    for _ in range(4):
        with torch.no_grad():
            step = model(ids, torch.ones_like(ids))[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, step], dim=1)
    assert torch.equal(out, ids)


def test_domains_at_different_sites_have_gates_of_their_own(tmp_path: Path) -> None:
    from tests.mix.adapted import saved

    folders = {
        "pubmed": saved(tmp_path, tiny_model("llama"), "pubmed", layers=[0, 1]),
        "reviews": saved(tmp_path, tiny_model("llama"), "reviews", layers=[1]),
    }
    model = mix(tiny_model("llama"), folders)
    assert [gate.domains for gate in model.gates.values()] == [("pubmed",), ("pubmed", "reviews")]


def test_without_domains_and_without_anything(tmp_path: Path) -> None:
    model = mix(tiny_model("bert"), {}, "pfeiffer")
    assert model.gates == {} and model(*padded(ROWS)).shape == (3, 3)
    with GateMeans(model) as means:
        model(*padded(ROWS))
    assert means.to_dict() == {"mean": {}, "sites": {}}
    with pytest.raises(FactorMixError, match="nothing to train"):
        mix(tiny_model("llama"), {}, "none", outputs=0)


def test_gate_means_leave_padding_out(tmp_path: Path) -> None:
    model = mix(tiny_model("bert"), domains("bert", tmp_path))
    disturb(model)
    found = []
    for batch in (padded(ROWS), padded(ROWS, extra=5)):
        with torch.no_grad(), GateMeans(model) as means:
            model(*batch)
        found.append(means.to_dict())
    assert list(found[0]["mean"]) == ["ffn", "pubmed", "reviews"] and found[0]["mean"]["ffn"] == 1.0
    for name, value in found[0]["mean"].items():
        assert found[1]["mean"][name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("family", [f for f in TINY if not f.startswith(("t5-plain", "t5-gated", "mt5", "umt5"))])
@pytest.mark.parametrize("kind", ["pfeiffer", "houlsby"])
def test_bottlenecks_work_for_every_family(family: str, kind: str) -> None:
    want = tiny_output(tiny_model(family))
    model = mix(tiny_model(family), {}, kind)
    assert torch.equal(tiny_output(model.model), want)
    disturb(model)
    assert not torch.allclose(tiny_output(model.model), want)
    ids = tiny_inputs(model.model)["input_ids"]
    assert model(ids, torch.ones_like(ids)).shape == (2, 3)


def test_what_has_no_place_is_refused_with_the_reason(tmp_path: Path) -> None:
    for family in ("t5-plain", "t5-gated", "mt5", "umt5"):
        with pytest.raises(FactorMixError, match="encoder-decoder; stage 2 needs one stack"):
            mix(tiny_model(family), {})
    for family in sorted(WITHOUT_LORA):
        with pytest.raises(FactorMixError, match=f"PEFT names no attention projections for '{family}'"):
            mix(tiny_model(family), {}, "lora")
    for family in ("bert", "albert", "modernbert"):
        with pytest.raises(FactorMixError, match="'prefix'.*takes no keys and values"):
            mix(tiny_model(family), {}, "prefix")
    with pytest.raises(FactorMixError, match="unknown task adapter 'pfeifer'.*Did you mean 'pfeiffer'"):
        TaskAdapterSpec("pfeifer")
    with pytest.raises(FactorMixError, match="unknown pooling 'max'; allowed: 'first', 'last', 'mean'"):
        mix(tiny_model("llama"), {}, pooling="max")


def test_every_kind_of_task_adapter_is_made_and_another_is_an_error() -> None:
    assert set(mix_model.TASK_ADAPTERS) == set(TASK_ADAPTERS)
    spec = TaskAdapterSpec("none")
    object.__setattr__(spec, "kind", "lorra")  # past the spec's own check
    with pytest.raises(
        FactorMixError, match="unknown task adapter 'lorra'; allowed: 'pfeiffer', .*Did you mean 'lora'"
    ):
        mix_model.make_task_adapter(spec, tiny_model("llama"), [])


def test_a_factored_model_takes_the_same(tmp_path: Path) -> None:
    from tests.nn.sparse import sparsify

    folders = domains("llama", tmp_path, lambda: sparsify(tiny_model("llama")))
    model = mix(sparsify(tiny_model("llama")), folders, "houlsby")
    assert isinstance(model, MixModel) and any(isinstance(m, DomainFFN) for m in model.modules())
    disturb(model)
    with torch.no_grad():
        alone = torch.cat([model(*padded([row])) for row in ROWS])
        assert torch.allclose(model(*padded(ROWS)), alone, atol=1e-5)
