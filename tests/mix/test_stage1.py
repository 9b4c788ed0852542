"""Stage 1: it learns, it leaves everything but the adapter as it was, and a killed run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from factormix import FactorMixError
from factormix.data.packing import Packed
from factormix.mix.batches import Stage1Batches
from factormix.mix.config import InjectConfig
from factormix.mix.losses import InjectionLoss
from factormix.mix.peft_tuner import adapter_names
from factormix.mix.stage1 import inject
from factormix.run.workdir import WorkDirectory
from tests.factor.test_factorize import windows
from tests.families import TINY, tiny_output
from tests.launch import two_processes
from tests.mix.adapted import FORMS, base_model

QUICK = InjectConfig(tokens=256, batch_tokens=64, window=16, width=8, lr=1e-2, save_steps=2, layers="0,1")


class Tokenizer:
    """All that `inject` asks of one."""

    mask_token_id = 4


def learnable(count: int = 16) -> Packed:
    """Windows that repeat themselves: something to learn."""
    text = windows(count)
    return Packed(text.input_ids[:1].repeat(count, 1), text.scored, text.tokens, "one")


def batches(knowledge: Packed | None = None, general: Packed | None = None) -> Stage1Batches:
    return Stage1Batches(knowledge or learnable(), [], general or windows(seed=7), 16)


def run(model, config: InjectConfig = QUICK, **options):  # type: ignore[no-untyped-def]
    return inject(model, "pubmed", batches(), config, Tokenizer(), quiet=True, **options)  # type: ignore[arg-type]


LEARN = sorted(f for f, tiny in TINY.items() if "CausalLM" in tiny.model.__name__ or "LMHead" in tiny.model.__name__
               or "MaskedLM" in tiny.model.__name__ or f == "gemma3")  # fmt: skip


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", LEARN)
def test_only_the_adapter_changes_in_every_family(family: str, sparse: bool) -> None:
    """Defect 5 of the released code: RoBERTa only."""
    model = base_model(family, sparse)
    want, before = tiny_output(model), {id(p): p.detach().clone() for p in model.parameters()}
    layers = "0" if family.startswith("albert") else QUICK.layers
    wrapped, done = run(model, QUICK.replace(layers=layers, tokens=128))
    trained = adapter_names(wrapped, "pubmed")
    for name, parameter in wrapped.named_parameters():
        assert not parameter.requires_grad
        if name not in trained:
            assert torch.equal(parameter, before[id(parameter)]), name
    assert not torch.equal(tiny_output(model), want)
    with wrapped.disable_adapter():
        assert torch.equal(tiny_output(model), want)
    assert done["tokens"] == 128 and done["params_trained"] == done["metrics"]["adapter"]["parameters"]


@pytest.mark.parametrize("old_knowledge", ["distil", "normalised"])
@pytest.mark.parametrize("form", FORMS)
def test_it_learns_and_old_knowledge_holds_it_back(form: str, old_knowledge: str) -> None:
    moved, knowledge = {}, {}
    for old in (old_knowledge, "none"):
        model = base_model("llama")
        options = {k: v for k, v in FORMS[form].items()}
        _, done = run(model, QUICK.replace(old_knowledge=old, tokens=1024, **options))
        history = done["metrics"]["history"]
        knowledge[old] = history[-1]["knowledge"] - history[0]["knowledge"]
        ids = windows(seed=8).input_ids  # general text that was not trained on
        with torch.no_grad():
            judge = InjectionLoss(model, "pubmed", QUICK.replace(old_knowledge=old_knowledge))
            moved[old] = float(judge.old(ids, torch.ones_like(ids)))
        if old != "none":
            assert history[0]["old"] == 0 and history[-1]["old"] > 0
    assert knowledge[old_knowledge] < -0.05 and knowledge["none"] < -0.05
    assert moved["none"] > 1.2 * moved[old_knowledge] > 0, moved


def test_structured_knowledge_trains_too() -> None:
    """Defect 4 of the released code: its structured path was unreachable."""
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])
    counted = torch.tensor([[False, False, False, True]] * 2)
    fact = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "counted": counted,
            "structured": torch.tensor(True)}  # fmt: skip
    for family in ("llama", "bert"):
        only = Stage1Batches(None, [fact], windows(seed=7), 16)
        alone = QUICK.replace(tokens=1024, old_knowledge="none")
        _, done = inject(base_model(family), "pubmed", only, alone, Tokenizer(), quiet=True)  # type: ignore[arg-type]
        history = done["metrics"]["history"]
        assert history[-1]["knowledge"] < 0.95 * history[0]["knowledge"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_seed_decides_the_result_and_repeats_it(family: str) -> None:
    """Defect 4 once more: the seed only named the run. All windows are equal: of llama it decides the adapters' start
    alone, of bert the masks too."""
    same = batches(general=learnable())
    results = []
    for seed in (0, 0, 1):
        model = base_model(family)
        inject(model, "pubmed", same, QUICK.replace(seed=seed), Tokenizer(), quiet=True)  # type: ignore[arg-type]
        results.append(tiny_output(model))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_killed_run_goes_on_from_its_last_checkpoint(family: str, tmp_path: Path) -> None:
    straight, _ = run(base_model(family))
    original, calls = InjectionLoss.__call__, []

    def dies(self: InjectionLoss, model: torch.nn.Module, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) > 12:  # four windows a step: in step 4 of 4
            raise KeyboardInterrupt
        return original(self, model, part)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(InjectionLoss, "__call__", dies)
        run(base_model(family), work=WorkDirectory(tmp_path / "w", {}))
    checkpoint = tmp_path / "w" / "stage1" / "checkpoint-2"
    assert sum(f.stat().st_size for f in checkpoint.rglob("*.safetensors")) < 20_000  # the adapter, not the model
    again, done = run(base_model(family), work=WorkDirectory(tmp_path / "w", {}))
    assert [row["step"] for row in done["metrics"]["history"]] == [3, 4]
    for (name, a), (_, b) in zip(straight.named_parameters(), again.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_two_processes_train_one_adapter(tmp_path: Path) -> None:
    """L_S runs the model beside the wrapper that averages gradients over processes; they must agree all the same."""
    one, two = two_processes("mix/inject_script.py", tmp_path)
    assert one["world"] == 2 and one["tokens"] == 512
    assert all(torch.equal(tensor, two["weights"][name]) for name, tensor in one["weights"].items())
    assert all(tensor.abs().max() > 0 for tensor in one["weights"].values())


def test_nan_stops_the_run() -> None:
    model = base_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FactorMixError, match="loss became nan at step 0"):
        run(model)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(FactorMixError, match="domain 'pub med' is not allowed"):
        inject(base_model("llama"), "pub med", batches(), QUICK, quiet=True)
    with pytest.raises(FactorMixError, match="has no mask token"):
        inject(base_model("bert"), "pubmed", batches(), QUICK, quiet=True)
    for family in ("bert-classify", "t5-plain", "t5-gated", "t5-encoder", "mt5", "umt5"):
        with pytest.raises(FactorMixError, match="neither a causal nor a masked"):
            run(base_model(family))
    with pytest.raises(FactorMixError, match="less than one step"):
        run(base_model("llama"), QUICK.replace(tokens=32))
