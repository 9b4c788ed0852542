"""The model object is a real transformers model: generate, caches, losses, Trainer, PEFT, checkpointing, compile."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Trainer, TrainingArguments

from factormix.ffn import find_sites, isolate
from factormix.nn import FactorMixMixin, Layout, SparseFFN, base_class
from factormix.run.errors import FactorMixError
from tests.families import TINY, tiny_model, tiny_output
from tests.nn.sparse import sparsify, twins

CAUSAL = ["llama", "llama-bias", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "qwen3"]
GENERATE = [*CAUSAL, "t5-gated", "mt5"]


def prompt(rows: int = 2, length: int = 6, seed: int = 4) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12, do_sample=False, **options
    )


@pytest.mark.parametrize("family", GENERATE)
def test_all_on_generates_the_dense_models_tokens(family: str) -> None:
    dense, sparse = twins(family, "S1A3E4")
    assert torch.equal(greedy(sparse, prompt()), greedy(dense, prompt()))


@pytest.mark.parametrize("family", GENERATE)
def test_the_cache_changes_no_token(family: str) -> None:
    _, sparse = twins(family, "S1A1E4")
    with_cache = greedy(sparse, prompt(), use_cache=True)
    assert with_cache.shape[1] >= 12
    assert torch.equal(with_cache, greedy(sparse, prompt(), use_cache=False))
    assert torch.equal(with_cache[:1], greedy(sparse, prompt()[:1]))  # nor does the batch mate


@pytest.mark.parametrize("family", CAUSAL)
def test_cached_decoding_of_single_tokens_gives_the_prefills_logits(family: str) -> None:
    """Defect 7: cached decoding of one token crashed."""
    _, sparse = twins(family)
    ids = prompt(1, 8)
    with torch.no_grad():
        want = sparse(ids).logits
        cache, got = None, []
        for t in range(ids.shape[1]):
            out = sparse(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            got.append(out.logits)
    assert torch.allclose(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("pad", [1, 5])
def test_left_padding_changes_nothing(family: str, pad: int) -> None:
    _, sparse = twins(family)
    short, long = prompt(1, 6), prompt(1, 6 + pad, seed=9)
    batch = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :pad] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        together = sparse(batch, attention_mask=mask, position_ids=places).logits
        assert torch.allclose(together[0, pad:], sparse(short).logits[0], rtol=1e-4, atol=1e-4)
        assert torch.allclose(together[1], sparse(long).logits[0], rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    made = sparse.generate(batch, attention_mask=mask, **options)[0, pad:]
    assert torch.equal(made, sparse.generate(short, attention_mask=torch.ones_like(short), **options)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt", "albert", "modernbert", "t5-gated"])
@pytest.mark.parametrize("layout", ["S0A1E4", "S1A2E8"])
def test_the_flops_of_a_forward_are_the_active_fractions(family: str, layout: str) -> None:
    """Defect 1: every expert ran, twice, and the dense FFN beside them."""
    dense, sparse = twins(family, layout)
    sites, counts, crossed = find_sites(dense), [], {}
    for site in sites:  # how many tokens cross each FFN
        count = lambda _m, args, i=site.index: crossed.update({i: crossed.get(i, 0) + args[0].numel() // 32})  # noqa: E731
        isolate(dense, site).register_forward_pre_hook(count)
    for model in (dense, sparse):
        with FlopCounterMode(display=False) as counter:
            tiny_output(model)
        counts.append(counter.get_total_flops())
    cut = Layout.parse(layout)
    idle = sum(2 * crossed[s.index] * s.matrix_parameters * (1 - cut.active_fraction) for s in sites)
    routers = sum(2 * crossed[s.index] * s.hidden * cut.routed for s in sites)
    assert counts[0] - counts[1] == idle - routers


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5-gated"])
def test_the_loss_is_the_dense_models_and_looks_at_every_sample(family: str) -> None:
    """Defect 7: with a batch, the loss was that of sample 0."""
    dense, sparse = twins(family, "S1A3E4")
    ids = prompt(3, 6)
    with torch.no_grad():
        loss = sparse(input_ids=ids, labels=ids).loss
        assert torch.allclose(loss, dense(input_ids=ids, labels=ids).loss, rtol=1e-4)
        each = [sparse(input_ids=row[None], labels=row[None]).loss for row in ids]
        assert torch.allclose(loss, torch.stack(each).mean(), rtol=1e-4)
        for other in range(3):
            changed = ids.clone()
            changed[other] = changed[other].roll(1)
            assert not torch.isclose(sparse(input_ids=ids, labels=changed).loss, loss, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert", "albert", "opt", "t5-gated"])
def test_a_loss_on_the_logits_alone_reaches_every_router(family: str) -> None:
    """Defect 2: the mask was hard and the step returned the cross-entropy only, so the router never trained."""
    _, sparse = twins(family)
    want = tiny_output(sparse)
    sparse.train()
    for module in sparse.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_probs_dropout_prob", "attention_dropout", "dropout", "dropout_rate", "layerdrop"):
        if hasattr(sparse.config, name):
            setattr(sparse.config, name, 0.0)
    for module in sparse.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    ids = prompt(2, 7)
    logits = sparse(input_ids=ids, **({"labels": ids} if family.startswith("t5") else {})).logits
    teacher = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    torch.nn.functional.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean").backward()
    for ffn in sparse.sparse_ffns().values():
        assert float(ffn.router.weight.grad.norm()) > 1e-7
    if not family.startswith("t5"):
        assert torch.allclose(tiny_output(sparse.train()), tiny_output(sparse.eval()), rtol=1e-4, atol=1e-5)
    assert torch.equal(tiny_output(sparse.eval()), want)


def test_odd_sizes_and_depths() -> None:
    """Defect 8: shapes were hard-coded."""
    sizes = {"hidden_size": 35, "head_dim": 6, "intermediate_size": 51, "num_hidden_layers": 3}
    options = {**TINY["llama"].options, **sizes, "num_attention_heads": 5, "num_key_value_heads": 1}
    config = TINY["llama"].config(**options)
    dense = TINY["llama"].model(config).eval()
    sparse = sparsify(copy.deepcopy(dense), "S1A2E3")
    assert [ffn.spec.width for ffn in sparse.sparse_ffns().values()] == [17] * 3
    with torch.no_grad():
        assert torch.allclose(sparse(prompt()).logits, dense(prompt()).logits, rtol=1e-4, atol=1e-5)


def test_the_class_is_the_familys_with_the_mixin() -> None:
    _, sparse = twins("llama")
    assert isinstance(sparse, FactorMixMixin) and isinstance(sparse, TINY["llama"].model)
    assert base_class(sparse) is TINY["llama"].model
    assert type(sparse).__name__ == "FactorMixLlamaForCausalLM"
    assert sorted(sparse.sparse_ffns()) == [0, 1]
    assert all(isinstance(ffn, SparseFFN) for ffn in sparse.sparse_ffns().values())


def test_a_deep_copy_is_independent() -> None:
    _, sparse = twins("llama")
    twin = copy.deepcopy(sparse)
    assert torch.equal(tiny_output(twin), tiny_output(sparse)) and type(twin) is type(sparse)
    torch.nn.init.zeros_(twin.sparse_ffns()[0].experts.down_proj)
    assert not torch.equal(tiny_output(twin), tiny_output(sparse))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_of_a_forward(family: str, backend: str) -> None:
    torch._dynamo.reset()
    _, sparse = twins(family)
    compiled = torch.compile(sparse, backend=backend)
    with torch.no_grad():
        for ids in (prompt(1, 1), prompt(2, 7)):
            assert torch.allclose(compiled(input_ids=ids)[0], sparse(input_ids=ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert", "t5-gated", "gpt2"])
def test_bfloat16_stays_near_float32(family: str) -> None:
    _, sparse = twins(family, "S1A3E4")
    want = tiny_output(sparse)
    got = tiny_output(sparse.bfloat16())
    assert got.dtype == torch.bfloat16
    assert float((got.float() - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    _, sparse = twins("llama")
    ids, found = prompt(), []
    for on in (False, True):
        model = copy.deepcopy(sparse).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, want in found[0].items():
        assert torch.allclose(found[1][name], want, rtol=1e-4, atol=1e-6), name


def arguments(folder: Path, **options: object) -> TrainingArguments:
    defaults = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    return TrainingArguments(str(folder), **{**defaults, "disable_tqdm": True, "learning_rate": 1e-2, **options})


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in prompt(count, 6)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_saves_and_resumes(checkpointing: bool, tmp_path: Path) -> None:
    from factormix import load

    _, sparse = twins("llama")
    before = {name: p.detach().clone() for name, p in sparse.named_parameters()}
    options = {"gradient_checkpointing": checkpointing, "save_steps": 1, "save_strategy": "steps"}
    Trainer(sparse, arguments(tmp_path, **options), train_dataset=rows()).train()
    unchanged = [name for name, p in sparse.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in unchanged if ".mlp." in name]
    sparse.eval()
    loaded = load(tmp_path / "checkpoint-1")
    assert torch.allclose(tiny_output(loaded), tiny_output(sparse), rtol=1e-5, atol=1e-6)
    again = Trainer(loaded, arguments(tmp_path, **options, **{"max_steps": 2}), train_dataset=rows())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "hashes.json").is_file()


def test_trainer_saves_beside_its_checkpoints(tmp_path: Path) -> None:
    from factormix import load

    _, sparse = twins("llama")
    out = tmp_path / "out"
    trainer = Trainer(sparse, arguments(out, save_steps=1, save_strategy="steps"), train_dataset=rows())
    trainer.train()
    sparse.save_pretrained(out, max_shard_size="10KB")  # in several files, which the next model has not
    assert len(list(out.glob("*.safetensors"))) > 1
    before = tiny_output(load(out))
    sparse.lm_head.weight.data.mul_(2)
    trainer.save_model()  # over the former one
    sparse.eval()
    assert torch.allclose(tiny_output(load(out)), tiny_output(sparse), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tiny_output(load(out)), before)
    again = Trainer(load(out), arguments(out, save_strategy="no", max_steps=2), train_dataset=rows())
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_a_folder_that_is_not_trainers_is_not_touched(tmp_path: Path) -> None:
    _, sparse = twins("llama")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FactorMixError, match="exists and is not empty"):
        sparse.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_lora_on_the_attention_of_a_sparse_model(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    _, sparse = twins("llama")
    want = tiny_output(sparse)
    base = copy.deepcopy(sparse)
    tuned = get_peft_model(sparse, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(tiny_output(tuned), want)
    tuned.train()
    ids = prompt()
    tuned(input_ids=ids, labels=ids).loss.backward()
    grads = {name for name, p in tuned.named_parameters() if p.grad is not None and float(p.grad.norm()) > 0}
    assert grads and all("lora" in name for name in grads)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora" in name:
                p.add_(0.1)
    changed = tiny_output(tuned.eval())
    assert not torch.allclose(changed, want)
    tuned.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(tiny_output(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), changed, atol=1e-6)
    merged = tuned.merge_and_unload()
    assert isinstance(merged, FactorMixMixin) and torch.allclose(tiny_output(merged), changed, rtol=1e-4, atol=1e-5)


def test_an_untouched_dense_model_is_left_alone() -> None:
    """Twins share nothing: the dense one still computes what it did."""
    dense, _ = twins("llama")
    assert torch.equal(tiny_output(dense), tiny_output(tiny_model("llama")))
