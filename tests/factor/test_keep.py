"""A static model keeps the experts that serve a text: the right ones, with the right weights, at every kind of FFN."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from factormix import FactorMixError, load
from factormix.factor import keep
from factormix.factor.config import FactorConfig, HealConfig
from factormix.factor.factorize import factorize, work_directory
from factormix.factor.keep import keep_experts, most_useful, static_ffn
from factormix.nn import SparseFFN
from tests.factor.test_factorize import windows
from tests.families import tiny_model, tiny_output
from tests.nn.sparse import sparsify

QUICK = {"tokens": 256, "window": 16}


def first_ffn(family: str = "llama", layout: str = "S1A2E8") -> SparseFFN:
    return next(m for m in sparsify(tiny_model(family), layout).modules() if isinstance(m, SparseFFN))


def inputs(ffn: SparseFFN, tokens: int = 200) -> Tensor:
    return torch.randn(tokens, ffn.spec.hidden, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def parts(ffn: SparseFFN, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shared output and bias (T, H), each expert's (T, R, H), and which are chosen (T, R)."""
    packed = ffn.experts.packed()
    outputs = torch.stack([packed.run(i, x) for i in range(ffn.spec.layout.routed)], dim=1)
    always = torch.zeros_like(x) if ffn.shared is None else ffn.shared(x)
    _, chosen = ffn.router(x)
    hot = torch.zeros(outputs.shape[:2]).scatter_(1, chosen, 1.0)
    return always + (0 if ffn.bias is None else ffn.bias), outputs, hot


@torch.no_grad()
@pytest.mark.parametrize(("family", "layout"), [("llama", "S1A2E8"), ("llama", "S0A2E8"), ("gpt2", "S1A2E8")])
@pytest.mark.parametrize("kept", [[0, 5], [3], []])
def test_the_static_ffn_is_shared_neurons_and_kept_experts(family: str, layout: str, kept: list[int]) -> None:
    ffn = first_ffn(family, layout)
    if ffn.shared is None and not kept:
        return
    x = inputs(ffn)
    always, outputs, _ = parts(ffn, x)
    static = static_ffn(ffn, kept)
    assert torch.allclose(static(x), always + outputs[:, kept].sum(1), atol=1e-5)
    assert (static.spec.shared, static.spec.active) == (ffn.spec.shared + len(kept), 0) and static.router is None


@torch.no_grad()
def lost(ffn: SparseFFN, x: Tensor, kept: tuple[int, ...]) -> float:
    """lost(C) of the module's text, term by term."""
    _, outputs, hot = parts(ffn, x)
    size = ffn(x).square().sum(-1)
    missed = (hot.unsqueeze(-1) * outputs).sum(1) - outputs[:, list(kept)].sum(1)
    return float((missed.square().sum(-1) / (size + keep.FLOOR * size.median())).sum())


def test_each_step_takes_the_expert_that_leaves_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "CHUNK", 64)  # several chunks
    ffn = first_ffn()
    x = inputs(ffn)
    target = ffn(x).detach()
    assert most_useful(ffn, x, target, 0) == []
    chosen: tuple[int, ...] = ()
    for count in range(1, 7):
        rest = [i for i in range(7) if i not in chosen]
        chosen = min(((*chosen, i) for i in rest), key=lambda each: lost(ffn, x, each))
        assert most_useful(ffn, x, target, count) == sorted(chosen)
    pairs = {pair: lost(ffn, x, pair) for pair in itertools.combinations(range(7), 2)}
    assert pairs[tuple(most_useful(ffn, x, target, 2))] < sorted(pairs.values())[len(pairs) // 4]


@torch.no_grad()
def test_experts_that_a_text_never_chooses_go() -> None:
    ffn = first_ffn()
    ffn.router.weight.zero_()
    ffn.router.weight[[2, 6], 0] = 1.0  # where x_0 > 0 experts 2 and 6 win; massive tokens choose others
    x = inputs(ffn)
    x[:, 0] = x[:, 0].abs() + 0.1
    x[:2, 0] *= -1000.0
    assert most_useful(ffn, x, ffn(x), 2) == [2, 6]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert", "t5-gated"])
def test_models_keep_experts_save_and_load(family: str, tmp_path: Path) -> None:
    routed = sparsify(tiny_model(family), "S1A1E4")
    before = tiny_output(routed)
    config = FactorConfig.parse("S2A0E4", fit_passes=1, **QUICK)
    static = keep_experts(routed, config, windows(), quiet=True)
    assert torch.equal(tiny_output(routed), before) and routed.sparse_ffns()[0].router is not None
    sites = static.config.factormix["made_by"]["sites"]
    assert all(len(site["kept"]) == 1 and site["error_after"] < site["error_before"] for site in sites)
    assert {str(ffn.spec.layout) for ffn in static.sparse_ffns().values()} == {"S2A0E4"}
    static.save_pretrained(str(tmp_path / "out"))
    assert torch.allclose(tiny_output(load(tmp_path / "out")), tiny_output(static), atol=1e-6)


@torch.no_grad()
def test_each_ffn_is_fitted_at_the_states_of_the_static_ones_before() -> None:
    routed = sparsify(tiny_model("llama"), "S1A1E4")
    static = keep_experts(routed, FactorConfig.parse("S2A0E4", layer_fit=False, **QUICK), windows(), quiet=True)
    seen: list[Tensor] = []
    ffn = static.sparse_ffns()[1]
    ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    static(input_ids=windows().input_ids)
    old = routed.sparse_ffns()[1]
    kept = most_useful(old, seen[0], old(seen[0]), 1)
    assert static.config.factormix["made_by"]["sites"][1]["kept"] == kept
    assert torch.allclose(ffn(seen[0]), static_ffn(old, kept)(seen[0]), atol=1e-6)


def test_the_dense_model_is_the_teacher_where_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, routed = tiny_model("llama"), sparsify(tiny_model("llama"), "S1A1E4")
    asked: list[tuple[Tensor, Tensor]] = []
    own = keep.most_useful
    monkeypatch.setattr(keep, "most_useful", lambda ffn, x, *rest: asked.append((x, rest[0])) or own(ffn, x, *rest))
    config = FactorConfig.parse("S2A0E4", fit_passes=4, **QUICK)
    static = [keep_experts(routed, config, windows(), dense=each, quiet=True) for each in (dense, None)]
    for layer, (x, target) in zip(dense.model.layers, asked[: len(dense.model.layers)], strict=True):
        assert torch.allclose(layer.mlp(x), target, atol=1e-5)
    with torch.no_grad():
        outputs = [model(input_ids=windows().input_ids).logits for model in (dense, *static)]
    assert (outputs[1] - outputs[0]).norm() < (outputs[2] - outputs[0]).norm()
    with pytest.raises(FactorMixError, match="not the dense model"):
        keep_experts(routed, config, windows(), dense=tiny_model("gpt2"), quiet=True)


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routed = sparsify(tiny_model("llama"), "S1A1E4")
    config = FactorConfig.parse("S2A0E4", **QUICK)
    whole = keep_experts(routed, config, windows(), quiet=True)
    own, calls = keep.most_useful, []

    def counted(*args: object) -> list[int]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(keep, "most_useful", counted)
    for _ in range(2):
        work = work_directory(tmp_path / "out", config, {})
        with contextlib.suppress(KeyboardInterrupt):
            resumed = keep_experts(routed, config, windows(), work=work, quiet=True)
    assert len(calls) == 3  # the first FFN was not ranked again
    assert torch.equal(tiny_output(resumed), tiny_output(whole))
    made, wanted = (model.config.factormix["made_by"]["sites"] for model in (resumed, whole))
    assert made == wanted


def test_healing_has_the_routed_model_as_teacher() -> None:
    routed, ids = sparsify(tiny_model("llama"), "S1A1E4"), windows().input_ids
    heal = HealConfig(tokens=512, batch_tokens=64, lr=3e-3)
    with torch.no_grad():
        want = routed(input_ids=ids).logits.log_softmax(-1)
    away = []
    for options in ({}, {"heal": heal}):
        config = FactorConfig.parse("S2A0E4", layer_fit=False, **options, **QUICK)
        static = keep_experts(routed, config, windows(), quiet=True)
        with torch.no_grad():
            away.append(
                float(
                    kl_div(static(input_ids=ids).logits.log_softmax(-1), want, None, None, "batchmean", log_target=True)
                )
            )
    assert away[1] < 0.8 * away[0]
    assert static.config.factormix["made_by"]["healing"]["tokens"] > 0


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        ("S2A1E4", {}, "allowed: S1A0E4 to S3A0E4"),
        ("S4A0E8", {}, "allowed: S1A0E4 to S3A0E4"),
        ("S4A0E4", {}, "allowed: S1A0E4 to S3A0E4"),
        ("S2A0E4", {"partition": "kmeans"}, "partition 'kmeans'"),
        ("S2A0E4", {"layers": [0]}, "layers"),
        ("S2A0E4", {"heal": HealConfig(tokens=8, pa=1.0)}, "heal.pa"),
    ],
)
def test_what_cannot_be_kept_is_refused(layout: str, options: dict, words: str) -> None:
    routed = sparsify(tiny_model("llama"), "S1A1E4")
    with pytest.raises(FactorMixError) as error:
        keep_experts(routed, FactorConfig.parse(layout, **options), windows(), quiet=True)
    assert words in str(error.value)


def test_models_without_such_experts_are_refused() -> None:
    config = FactorConfig.parse("S2A0E4", **QUICK)
    with pytest.raises(FactorMixError, match="is dense"):
        keep_experts(tiny_model("llama"), config, windows(), quiet=True)
    static = keep_experts(sparsify(tiny_model("llama"), "S1A1E4"), config, windows(), quiet=True)
    with pytest.raises(FactorMixError, match="no routed experts"):
        keep_experts(static, config, windows(), quiet=True)
    with pytest.raises(FactorMixError, match="output weight 'soft'"):
        keep_experts(sparsify(tiny_model("llama"), "S1A1E4", output_weight="soft"), config, windows(), quiet=True)


def test_uneven_ffns_keep_slices_in_proportion_and_whole_ones_stay() -> None:
    dense = tiny_model("llama")
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.mul_(0.05)  # so the first FFN gets 6 of 8 slices, the second 2
    routed = factorize(dense, FactorConfig.parse("S2A2E8", **QUICK), windows(), quiet=True)
    assert [str(ffn.spec.layout) for ffn in routed.sparse_ffns().values()] == ["S3A3E8", "S1A1E8"]
    kept = keep_experts(routed, FactorConfig.parse("S3A0E8", **QUICK), windows(), quiet=True)
    assert [str(ffn.spec.layout) for ffn in kept.sparse_ffns().values()] == ["S4A0E8", "S2A0E8"]
    routed = factorize(dense, FactorConfig.parse("S3A3E8", **QUICK), windows(), quiet=True)
    assert [str(ffn.spec.layout) for ffn in routed.sparse_ffns().values()] == ["S8A0E8", "S2A2E8"]
    kept = keep_experts(routed, FactorConfig.parse("S3A0E8", **QUICK), windows(), quiet=True)
    assert [str(ffn.spec.layout) for ffn in kept.sparse_ffns().values()] == ["S8A0E8", "S2A0E8"]
    one, same = (model.sparse_ffns()[0].state_dict() for model in (kept, routed))
    assert all(torch.equal(one[name], same[name]) for name in same)
