"""Stage 1's rates, where none is given: they follow the FFNs' weights and the adapters' size, in every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from factormix.mix.config import InjectConfig
from factormix.mix.peft_tuner import MixDAConfig, adapter_names
from factormix.mix.stage1 import inject, peak_rates
from factormix.nn import sites_of
from tests.families import tiny_model
from tests.mix.adapted import FORMS, base_model
from tests.mix.test_stage1 import LEARN, QUICK, Tokenizer, batches


def rates_of(
    model: PreTrainedModel, width: int = 8, form: str = "ffn", layers: tuple[int, ...] = (0,)
) -> dict[str, float]:
    """By the tensor's own name; the sites of one model are alike."""
    config = MixDAConfig(layers=list(layers), width=width, **FORMS[form])
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config, adapter_name="pubmed")
    rates = peak_rates(wrapped, "pubmed")
    assert set(rates) == adapter_names(wrapped, "pubmed")
    return {name.rsplit(".", 1)[1]: rate for name, rate in rates.items()}


def scaled(family: str, up: float, down: float) -> PreTrainedModel:
    model = tiny_model(family)
    with torch.no_grad():
        for site in sites_of(model):
            for name, factor in ((site.paths.up, up), (site.paths.down, down)):
                model.get_submodule(f"{site.at}.{name}" if site.at else name).weight.mul_(factor)
    return model


@pytest.mark.parametrize("family", LEARN)
def test_of_a_sparse_model_they_are_the_dense_models(family: str) -> None:
    """All its neurons count, whichever of them run."""
    assert rates_of(base_model(family, sparse=True))["out_proj"] == pytest.approx(
        rates_of(base_model(family))["out_proj"]
    )


@pytest.mark.parametrize("form", FORMS)
def test_they_follow_the_weights_and_the_width(form: str) -> None:
    plain = rates_of(tiny_model("bert"), form=form)
    larger = rates_of(scaled("bert", 1, 3), form=form)
    wider = rates_of(tiny_model("bert"), width=16, form=form)
    both = rates_of(tiny_model("bert"), form=form, layers=(0, 1))
    for name in plain:
        of_out = name.startswith("out_")
        assert larger[name] == pytest.approx(plain[name] * (3 if of_out else 1))
        if of_out:
            assert wider[name] == pytest.approx(plain[name] / 2)
            assert both[name] == pytest.approx(plain[name] / 2, rel=0.2)  # the layers' weights differ a little


def test_rows_that_read_the_input_move_by_their_size() -> None:
    plain, larger = rates_of(tiny_model("llama")), rates_of(scaled("llama", 3, 1))
    assert larger["in_proj"] == pytest.approx(3 * plain["in_proj"])
    assert larger["out_proj"] == pytest.approx(plain["out_proj"])


def test_an_ffn_that_all_layers_share_is_crossed_by_each() -> None:
    model = tiny_model("albert")
    (site,) = sites_of(model)
    once = replace(site, layers=site.layers[:1])
    assert site.use_count > 1 and once.use_count == 1
    shared = rates_of(model)["out_proj"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factormix.mix.peft_tuner.sites_of", lambda _: (once,))
        alone = rates_of(tiny_model("albert"))["out_proj"]
    assert shared == pytest.approx(alone / site.use_count)


def test_a_rate_that_is_given_is_every_tensors() -> None:
    model = base_model("llama")
    _, done = inject(model, "pubmed", batches(), QUICK.replace(lr=3e-3), Tokenizer(), quiet=True)  # type: ignore[arg-type]
    assert done["metrics"]["lr"] == [3e-3, 3e-3]
    assert InjectConfig().lr is None
    _, done = inject(base_model("llama"), "pubmed", batches(), QUICK.replace(lr=None), Tokenizer(), quiet=True)  # type: ignore[arg-type]
    low, high = done["metrics"]["lr"]
    assert 0 < low < high < 3e-2
