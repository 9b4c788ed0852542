"""An encoder without a masked-LM head gets its family's, trained under a frozen encoder, and then learns by text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from factormix import FactorMixError
from factormix.mix.adapter_files import WEIGHTS, save_adapter
from factormix.mix.masked_head import HEAD, HeadLoss, MaskedHead, load_head, needs_head, train_head
from factormix.mix.peft_tuner import adapter_names
from factormix.mix.stage1 import inject
from factormix.mix.stage2 import adapt
from factormix.run.workdir import WorkDirectory
from tests.families import TINY, tiny_inputs, tiny_model, tiny_output
from tests.mix.adapted import base_model
from tests.mix.test_stage1 import QUICK, Tokenizer, batches, learnable
from tests.mix.toy import QUICK as STAGE2
from tests.mix.toy import examples, tokenizer

MASKED = sorted(name for name, tiny in TINY.items() if "MaskedLM" in tiny.model.__name__)
HEADED = QUICK.replace(head_tokens=512)


@pytest.mark.parametrize("family", MASKED)
def test_the_head_is_the_familys_own(family: str) -> None:
    """Given the tensors of a whole model's head, the bare encoder and the head say what the whole model says."""
    whole = tiny_model(family)
    words = whole.get_input_embeddings().weight
    whole.get_output_embeddings().weight = words  # the tiny models' noise has parted them
    encoder = whole.base_model
    assert needs_head(encoder) and not needs_head(whole)
    head = MaskedHead(encoder)
    named = dict(whole.named_parameters())
    head.fill({name: named[name] for name in head.tensors()})
    assert not any(name.startswith(f"{whole.base_model_prefix}.") for name in head.tensors())
    with torch.no_grad():
        got = head.logits(encoder(**tiny_inputs(whole)).last_hidden_state)
    assert torch.equal(got, tiny_output(whole))
    assert set(head.state_dict()) == head.trained
    assert all(p is not words and p.numel() < words.numel() for n, p in head.named_parameters() if n in head.trained)


def test_what_needs_no_head() -> None:
    for family in ("llama", "llama-base", "bert", "bert-classify", "t5-encoder", "t5-plain"):
        assert not needs_head(tiny_model(family)), family
    assert needs_head(base_model("bert-base", sparse=True))
    newer = tiny_model("deberta-v2").base_model
    newer.config.legacy = False
    assert not needs_head(newer)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_head_learns_and_the_encoder_stays_bit_for_bit(sparse: bool) -> None:
    encoder = base_model("bert-base", sparse)
    before = {n: p.clone() for n, p in encoder.named_parameters()}
    head, done = train_head(encoder, learnable(), HEADED.replace(head_tokens=4096), Tokenizer(), quiet=True)  # type: ignore[arg-type]
    losses = [step["head"] for step in done["history"]]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8]) and done["tokens"] == 4096
    assert all(torch.equal(p, before[n]) for n, p in encoder.named_parameters())
    assert done["parameters"] == sum(t.numel() for t in head.tensors().values())
    assert not any(p.requires_grad for p in head.parameters())


def test_the_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    train_head(base_model("bert-base"), learnable(), HEADED, Tokenizer())  # type: ignore[arg-type]
    assert "BertModel has no masked-LM head" in capsys.readouterr().err


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_stage_1_trains_the_adapter_alone_and_stage_2_takes_it(sparse: bool, tmp_path: Path) -> None:
    encoder, config = base_model("bert-base", sparse), HEADED.replace(tokens=1024)
    head, _ = train_head(encoder, batches().general, config, Tokenizer(), quiet=True)  # type: ignore[arg-type]
    kept = {n: p.clone() for n, p in [*encoder.named_parameters(), *head.named_parameters()]}
    want = tiny_output(encoder)
    adapted, done = inject(encoder, "pubmed", batches(), config, Tokenizer(), head=head, quiet=True)  # type: ignore[arg-type]
    history = done["metrics"]["history"]
    assert history[-1]["knowledge"] < history[0]["knowledge"]
    assert history[0]["old"] < 1e-6 < history[-1]["old"]  # a sparse FFN under gradients rounds otherwise
    assert all(torch.equal(p, kept[n]) for n, p in head.named_parameters())
    with adapted.disable_adapter():
        assert torch.equal(tiny_output(encoder), want)
    save_adapter(adapted, "pubmed", tmp_path / "pubmed", head=head)
    assert load_file(tmp_path / "pubmed" / WEIGHTS).keys().isdisjoint(head.tensors())
    assert all(n.startswith("base_model.model.encoder.") for n in load_file(tmp_path / "pubmed" / WEIGHTS))
    assert len(adapter_names(adapted, "pubmed")) == 2 * 3  # the backbone's own kind: in, its bias, out

    again = load_head(base_model("bert-base", sparse), tmp_path / "pubmed")
    states = torch.randn(1, 5, 32)
    assert torch.equal(again.logits(states), head.logits(states))
    words = tokenizer(tmp_path)
    mix, _, found = adapt(base_model("bert-base", sparse), {"pubmed": tmp_path / "pubmed"}, examples(), examples(),
                          STAGE2.replace(epochs=2), words, quiet=True)  # fmt: skip
    assert mix.domains == ["pubmed"] and found["metrics"]["steps"] == 12


def test_a_killed_head_goes_on_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    def run(work: Path | None) -> dict[str, torch.Tensor]:
        folder = None if work is None else WorkDirectory(work, {})
        head, _ = train_head(base_model("bert-base"), learnable(), HEADED, Tokenizer(), work=folder, quiet=True)  # type: ignore[arg-type]
        return head.tensors()

    straight, calls, original = run(None), [], HeadLoss.__call__

    def dies(self: HeadLoss, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 22:  # four windows a step: in step 6 of 8
            raise KeyboardInterrupt
        return original(self, model, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadLoss, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "w")
        checkpoint = tmp_path / "w" / "head" / "checkpoint-4"
        assert sum(f.stat().st_size for f in checkpoint.glob("model*")) < 10_000  # the head, not the encoder
        again = run(tmp_path / "w")
        assert len(calls) == 22 + 4 * 4
        assert all(torch.equal(again[n], straight[n]) for n in straight)
        kept = run(tmp_path / "w")
        assert len(calls) == 22 + 4 * 4 and all(torch.equal(kept[n], straight[n]) for n in straight)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FactorMixError, match="BertModel has no masked-LM head; train one first"):
        inject(base_model("bert-base"), "pubmed", batches(), QUICK, Tokenizer(), quiet=True)  # type: ignore[arg-type]
    with pytest.raises(FactorMixError, match="its tokenizer has no mask token"):
        train_head(base_model("bert-base"), learnable(), HEADED, None, quiet=True)
    with pytest.raises(FactorMixError, match=f"{HEAD}' is missing"):
        load_head(base_model("bert-base"), tmp_path)
    with pytest.raises(FactorMixError, match="BertForMaskedLM is no bare encoder"):
        load_head(base_model("bert"), tmp_path)
    with pytest.raises(FactorMixError, match="neither a causal nor a masked"):
        inject(base_model("llama-base"), "pubmed", batches(), QUICK, quiet=True)
