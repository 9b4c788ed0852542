"""The pipeline: any family, determinism, resume, and that fitting does what it says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from factormix import FactorMixError, load
from factormix.data.packing import Packed
from factormix.export.needs import read_needs
from factormix.factor.config import PRESETS, FactorConfig
from factormix.factor.factorize import factorize, work_directory
from factormix.nn import SparseFFN
from tests.families import TINY, VOCAB, tiny_inputs, tiny_model, tiny_output

QUICK = {"router_steps": 20, "tokens": 256, "window": 16}


def windows(count: int = 16, length: int = 16, seed: int = 0) -> Packed:
    """Random tokens (count, length); the first of each window is not scored."""
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    return Packed(ids, scored, ids.numel(), f"random-{seed}")


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_factors_saves_and_loads(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family)
    before = tiny_output(dense)
    sparse = factorize(dense, FactorConfig.parse("S1A1E4", **QUICK), windows(), quiet=True)
    assert torch.equal(tiny_output(dense), before), "the dense model must stay as it was"
    sites = sparse.config.factormix["made_by"]["sites"]
    assert len(sites) == sum(isinstance(m, SparseFFN) for m in sparse.modules()) > 0
    assert all(0 <= site["recall"] <= 1 and site["error_after"] < 1 for site in sites)
    sparse.save_pretrained(str(tmp_path / "out"))
    loaded, wanted = load(tmp_path / "out"), sparse.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    assert torch.allclose(tiny_output(loaded), tiny_output(sparse), atol=1e-6)


def test_all_experts_on_is_the_dense_model_when_nothing_is_fitted() -> None:
    dense = tiny_model("llama")
    sparse = factorize(dense, FactorConfig.parse("S1A3E4", layer_fit=False, **QUICK), windows(), quiet=True)
    want, got = tiny_output(dense), tiny_output(sparse)
    assert (want - got).norm() / want.norm() < 1e-5


def test_frozen_parts_are_shared_with_the_dense_model_not_copied() -> None:
    dense = tiny_model("llama")
    sparse = factorize(dense, FactorConfig.parse("S1A1E4", **QUICK), windows(), quiet=True)
    pairs = dict(dense.named_parameters())
    shared = [name for name, p in sparse.named_parameters() if name in pairs]
    assert shared and all(dict(sparse.named_parameters())[name] is pairs[name] for name in shared)


def test_keep_dense_false_frees_each_dense_ffn() -> None:
    dense = tiny_model("llama")
    sparse = factorize(dense, FactorConfig.parse("S1A1E4", **QUICK), windows(), keep_dense=False, quiet=True)
    assert all(p.numel() == 0 for name, p in dense.named_parameters() if ".mlp." in name)
    assert torch.isfinite(tiny_output(sparse)).all()


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    outputs = []
    for seed in (0, 0, 1):
        config = FactorConfig.parse("S1A1E4", partition="random", seed=seed, **QUICK)
        outputs.append(tiny_output(factorize(tiny_model("llama"), config, windows(), quiet=True)))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_layers_are_chosen() -> None:
    config = FactorConfig.parse("S1A1E4", layers=[1], **QUICK)
    sparse = factorize(tiny_model("llama"), config, windows(), quiet=True)
    kinds = [type(layer.mlp).__name__ for layer in sparse.model.layers]
    assert kinds == ["LlamaMLP", "SparseFFN"]


def test_layer_fit_lowers_the_error_on_tokens_it_did_not_see() -> None:
    sites = {}
    for fit in (False, True):
        config = FactorConfig.parse("S1A1E4", layer_fit=fit, router_steps=60, fit_passes=0)
        sparse = factorize(tiny_model("llama"), config, windows(128), quiet=True)
        sites[fit] = sparse.config.factormix["made_by"]["sites"][0]
    assert sites[True]["error_after"] < sites[True]["error_before"]
    assert sites[False]["error_after"] == sites[False]["error_before"] == sites[True]["error_before"]


def test_a_fitted_router_beats_chance_and_joint_labels_beat_the_papers() -> None:
    recalls, errors = {}, {}
    for label in ("joint", "paper"):
        config = FactorConfig.parse("S1A1E4", label=label, layer_fit=False, router_steps=100)
        site = factorize(tiny_model("llama"), config, windows(128), quiet=True).config.factormix["made_by"]["sites"][0]
        recalls[label], errors[label] = site["recall"], site["error_before"]
    assert recalls["joint"] > 1.15 / 3  # chance: K / R = 1 / 3
    assert errors["joint"] < errors["paper"]


def test_a_killed_run_goes_on_from_the_sites_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FactorConfig.parse("S1A1E4", **QUICK)
    whole = tiny_output(factorize(tiny_model("llama"), config, windows(), quiet=True))
    work = work_directory(tmp_path / "out", config, {})
    import factormix.factor.factorize as module

    real, calls = module.fit_site, []

    def dies_at_the_second(*args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(module, "fit_site", dies_at_the_second)
    dense = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        factorize(dense, config, windows(), work=work, quiet=True)
    calls[:] = [1, 1]  # no further death; count what is fitted
    resumed = factorize(dense, config, windows(), work=work_directory(tmp_path / "out", config, {}), quiet=True)
    assert len(calls) == 3, "the first site must not be fitted again"
    assert torch.allclose(tiny_output(resumed), whole, atol=1e-5)


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    work_directory(tmp_path / "out", FactorConfig.parse("S1A1E4"), {})
    with pytest.raises(FactorMixError, match="layout.*--overwrite"):
        work_directory(tmp_path / "out", FactorConfig.parse("S1A2E4"), {})


def test_nan_in_the_dense_model_stops_the_run() -> None:
    dense = tiny_model("llama")
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(FactorMixError, match="NaN"):
        factorize(dense, FactorConfig.parse("S1A1E4", **QUICK), windows(), quiet=True)


def test_bad_requests_are_refused_before_compute() -> None:
    with pytest.raises(FactorMixError, match=r"64 neurons.*E = 5"):
        factorize(tiny_model("llama"), FactorConfig.parse("S1A1E5"), windows(), quiet=True)
    with pytest.raises(FactorMixError, match="R = E - S"):
        FactorConfig.parse("S2A3E4")
    with pytest.raises(FactorMixError, match="no shared neurons"):
        FactorConfig.parse("S1A1E4", gate="paper")
    sparse = factorize(tiny_model("llama"), FactorConfig.parse("S1A1E4", **QUICK), windows(), quiet=True)
    with pytest.raises(FactorMixError, match="sparse already"):
        factorize(sparse, FactorConfig.parse("S1A1E4"), windows(), quiet=True)


def test_the_paper_preset_keeps_the_active_fraction_and_runs() -> None:
    config = FactorConfig.preset("paper", "S1A1E4", **QUICK)
    assert config.layout == "S0A2E4" and config.gate == "paper" and not config.layer_fit
    sparse = factorize(tiny_model("llama"), config, windows(), quiet=True)
    assert torch.isfinite(tiny_output(sparse)).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("partition", ["coactivation", "wanda", "flap"])
def test_static_pruning_drops_the_other_neurons(family: str, partition: str, tmp_path: Path) -> None:
    dense = tiny_model(family)
    config = FactorConfig.parse("S2A0E4", partition=partition, layer_fit=False, allocation="uniform", **QUICK)
    pruned = factorize(dense, config, windows(), quiet=True)
    for ffn in pruned.sparse_ffns().values():
        assert ffn.router is None and ffn.experts is None
        assert ffn.shared.down_proj.weight.shape[1] == 2 * ffn.spec.width
        assert ffn.bias is not None if partition == "flap" else True
    pruned.save_pretrained(tmp_path / "pruned")
    assert torch.equal(tiny_output(load(tmp_path / "pruned")), tiny_output(pruned))
    fitted = factorize(dense, config.replace(layer_fit=True), windows(), quiet=True)
    before, after = (m.config.factormix["made_by"]["sites"][0] for m in (pruned, fitted))
    assert after["error_after"] < before["error_after"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("preset", ["moefication", "cmoe", "flap", "wanda"])
def test_the_presets_of_other_methods_run_at_the_same_active_fraction(preset: str, family: str, tmp_path: Path) -> None:
    config = FactorConfig.preset(preset, "S1A1E4", **QUICK)
    assert config.cut.active_fraction == 0.5 and not config.layer_fit
    sparse = factorize(tiny_model(family), config, windows(), quiet=True)
    kinds = {type(ffn.router).__name__ for ffn in sparse.sparse_ffns().values()}
    assert kinds == {{"moefication": "MLPRouter", "cmoe": "NeuronRouter"}.get(preset, "NoneType")}
    sparse.save_pretrained(str(tmp_path / "out"))
    assert torch.allclose(tiny_output(load(tmp_path / "out")), tiny_output(sparse), atol=1e-6)
    if preset in ("moefication", "cmoe") and family == "llama":
        with pytest.raises(FactorMixError, match="one linear layer"):
            read_needs(sparse)  # or a container would take its first layer for the whole


def test_presets_give_each_method_the_layout_it_knows() -> None:
    made = {name: FactorConfig.preset(name, "S4A4E16").layout for name in PRESETS}
    assert made == {
        "default": "S4A4E16", "paper": "S0A8E16", "moefication": "S0A8E16", "cmoe": "S4A4E16", "flap": "S8A0E16",
        "wanda": "S8A0E16",
    }  # fmt: skip
    same = FactorConfig.preset("cmoe", "S4A4E16").heal
    assert same == FactorConfig.preset("moefication").heal == FactorConfig.preset("default").heal
    with pytest.raises(FactorMixError, match="S0A2E4"):
        FactorConfig.parse("S1A1E4", partition="moefication")
    with pytest.raises(FactorMixError, match="partition 'cmoe'"):
        FactorConfig.parse("S1A1E4", router="neuron")


def test_partitions_that_prune_refuse_a_router() -> None:
    with pytest.raises(FactorMixError, match=r"'flap' prunes.*S2A0E4"):
        FactorConfig.parse("S1A1E4", partition="flap")


def test_generate_and_batch_mates(tmp_path: Path) -> None:
    sparse = factorize(tiny_model("llama"), FactorConfig.parse("S1A1E4", **QUICK), windows(), quiet=True)
    inputs = tiny_inputs(sparse)
    together = sparse(**inputs).logits
    for row in range(len(inputs["input_ids"])):
        alone = sparse(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        assert torch.allclose(alone[0], together[row], atol=1e-5)
    new = sparse.generate(inputs["input_ids"][:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    slow = sparse.generate(inputs["input_ids"][:1], max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(new, slow)


def test_dense_can_be_used_again_for_another_layout() -> None:
    dense = tiny_model("bert")
    first = copy.deepcopy(dense.state_dict())
    for layout in ("S1A1E4", "S0A1E2"):
        factorize(dense, FactorConfig.parse(layout, **QUICK), windows(), quiet=True)
    renamed = dense.state_dict()
    assert len(first) == len(renamed) and sum(v.sum() for v in first.values()) == sum(v.sum() for v in renamed.values())
