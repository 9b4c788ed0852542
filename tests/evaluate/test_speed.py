"""The benchmark does the work it says, in turn, and leaves the process as it found it. No test looks at a time."""

import pytest
import torch
from transformers import BertConfig, BertModel

from factormix.evaluate import speed
from factormix.evaluate.companions import COMPANIONS
from factormix.evaluate.cost import bytes_per_token, flops_per_token, weight_bytes
from factormix.evaluate.shapes import random_llamas
from factormix.evaluate.speed import bench
from factormix.nn import Layout
from factormix.run.errors import FactorMixError
from tests.evaluate.tiny import HIDDEN, LAYERS, VOCAB

QUICK = {"prompt_tokens": 4, "new_tokens": 3, "repeats": 3, "prefill_tokens": (8,)}


def test_json_keys_are_exact(llama, sparse_llama):
    made = bench(sparse_llama, llama(), **QUICK).to_dict()
    assert set(made) == {"schema_version", "decode", "prefill", "runs", "settings"}
    assert set(made["decode"]) == {"1"} and set(made["prefill"]) == {"8"}
    for entry in (made["decode"]["1"], made["prefill"]["8"]):
        assert set(entry) == {"base", "model", "ratio"}
        assert all(value > 0 for value in entry.values())
        assert entry["ratio"] == pytest.approx(entry["model"] / entry["base"])
    promised = {"phase", "size", "dtype", "threads", "implementation", "tokens_per_s", "ratio", "limit", "cost"}
    assert [run["implementation"] for run in made["runs"]] == ["dense", "factormix"] * 2
    for run in made["runs"]:
        assert set(run) == promised | {"tokens_per_s_iqr", "peak_bytes"}
        low, high = run["tokens_per_s_iqr"]
        assert 0 < low <= run["tokens_per_s"] <= high
    assert made["runs"][0]["ratio"] == made["runs"][0]["limit"] == 1.0


def test_threads_and_modes_are_put_back(llama):
    before = torch.get_num_threads()
    model, seen = llama(), []
    model.register_forward_pre_hook(lambda module, _: seen.append((torch.get_num_threads(), module.training)))
    bench(model.train(), None, threads=(before + 1, before + 2), **QUICK)
    assert {threads for threads, _ in seen} >= {before + 1, before + 2}
    assert torch.get_num_threads() == before
    assert model.training and not any(training for _, training in seen[1:])


def test_threads_are_put_back_after_an_error(llama):
    before = torch.get_num_threads()
    model = llama()
    model.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(model, None, threads=(before + 1,), **QUICK)
    assert torch.get_num_threads() == before


def test_models_take_turns_and_decode_with_a_cache(llama):
    base, model, calls = llama(0), llama(1), []
    for name, each in (("dense", base), ("factormix", model)):
        each.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: calls.append((name, tuple(kwargs["input_ids"].shape))), with_kwargs=True
        )
    bench(model, base, decode_batches=(2,), **QUICK | {"prefill_tokens": (), "repeats": 4})
    one_round = [(2, 4)] + [(2, 1)] * 3  # the prompt once, then a token at a time
    rounds = [calls[at : at + len(one_round)] for at in range(0, len(calls), len(one_round))]
    assert all([shape for _, shape in each] == one_round for each in rounds)
    assert [each[0][0] for each in rounds] == [
        "dense", "factormix",  # warm-up
        "dense", "factormix", "factormix", "dense", "dense", "factormix", "factormix", "dense",
    ]  # fmt: skip


def test_decoding_is_greedy(llama):
    model, text, steps = llama(), torch.arange(5, 9), []
    model.register_forward_pre_hook(lambda _, __, kwargs: steps.append(kwargs["input_ids"]), with_kwargs=True)
    bench(model, None, text=text, **QUICK | {"prefill_tokens": (), "repeats": 1})
    expected = llama().generate(text[None], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.cat(steps[-4:], 1).tolist() == expected.tolist()


def test_compiled_decoding_is_one_graph_and_the_same_tokens(llama, monkeypatch):
    made, own, fed = [], torch.compile, []

    def compile_eagerly(model, **options):
        made.append(options)
        step = own(model, backend="eager", **options)
        return lambda **given: (fed.append(given["input_ids"].item()), step(**given))[1]

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    model, text = llama(), torch.arange(5, 9)
    result = bench(model, None, compiled=True, text=text, **QUICK | {"repeats": 1})
    assert result.settings["compiled"] and [run.phase for run in result.runs] == ["decode", "prefill"]
    assert made == [{"fullgraph": True, "dynamic": False}]
    expected = model.generate(text[None], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert fed == expected[0, 4:-1].tolist() * 3  # twice to warm up


def test_prefill_asks_for_the_last_logits_and_no_cache(llama):
    model, seen = llama(), []
    model.register_forward_hook(lambda _, __, output: seen.append((output.logits.shape, output.past_key_values)))
    bench(model, None, **QUICK | {"decode_batches": ()})
    assert seen[-1] == ((1, 1, VOCAB), None)


def test_both_do_the_same_work_when_one_cannot_keep_the_last_logits(llama):
    class NoLast(type(llama())):
        def forward(self, input_ids=None, cache=None, use_cache=None):
            return super().forward(input_ids, cache=cache, use_cache=use_cache)

    base, model, seen = llama(), NoLast(llama().config).eval(), []
    for each in (base, model):
        each.register_forward_hook(lambda _, __, output: seen.append(output.logits.shape[1]))
    bench(model, base, **QUICK | {"decode_batches": ()})
    assert set(seen[-6:]) == {8}


def test_limits_are_the_ratio_of_costs(llama, sparse_llama):
    base = llama()
    made = bench(sparse_llama, base, generate_batches=(1,), **QUICK).runs  # the prompt's four tokens choose differently
    for layer in sparse_llama.model.layers:
        torch.nn.init.zeros_(layer.mlp.router.weight)  # now every row chooses alike: one of four experts is read
    made += bench(sparse_llama, base, decode_batches=(4,), **QUICK).runs
    limits = {(run.phase, run.size): run.limit for run in made if run.implementation == "factormix"}
    for batch in (1, 4):
        cache = batch * (4 + 7) / 2 * LAYERS * 2 * HIDDEN * 4  # keys and values in float32, on average over the steps
        expected = (bytes_per_token(base) + cache) / (bytes_per_token(sparse_llama) + cache)
        assert limits["decode", batch] == pytest.approx(expected)
    assert limits["generate", 1] is None
    saved = flops_per_token(base) - flops_per_token(sparse_llama)
    head = flops_per_token(base) - flops_per_token(base, head=False)
    dense = 8 * flops_per_token(base, context=4, head=False) + head
    assert limits["prefill", 8] == pytest.approx(dense / (dense - 8 * saved))


def test_dtypes_cast_a_copy_and_keep_the_model(llama):
    model, seen = llama(tie_word_embeddings=True), []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    made = bench(model, None, dtypes=("float32", "bfloat16"), **QUICK)
    assert {run.dtype for run in made.runs} == {"float32", "bfloat16"}
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {model.dtype}
    assert set(made.to_dict()["decode"]["1"]) == {"base", "model", "ratio"}
    cast = speed._as(model, torch.bfloat16, None)
    assert cast.lm_head.weight is cast.model.embed_tokens.weight
    assert weight_bytes(cast) < 0.6 * weight_bytes(model)


def test_companions_take_turns_in_every_dtype_and_stay_off_the_front(llama, sparse_llama):
    dense, sparse = random_llamas(llama(intermediate_size=64).config, Layout(4, 1, 8), torch.float32, 0)
    made = bench(sparse, dense, beside=COMPANIONS, dtypes=("float32", "bfloat16"), **QUICK).to_dict()
    names = ["dense", "factormix", *COMPANIONS]
    assert [run["implementation"] for run in made["runs"]] == names * 4
    assert all(run["tokens_per_s"] > 0 and run["ratio"] > 0 and run["limit"] > 0 for run in made["runs"])
    assert made["decode"]["1"]["model"] == made["runs"][1]["tokens_per_s"]
    by_name = {run["implementation"]: run["cost"] for run in made["runs"][:5]}
    assert by_name["transformers-eager"] == by_name["transformers-grouped_mm"] == by_name["factormix"]
    assert by_name["active-width"] < by_name["factormix"] < by_name["dense"]  # the router's bytes lie between


def test_generate_is_the_models_own(llama):
    model, seen = llama(), []
    model.generation_config.eos_token_id = list(range(1, VOCAB))  # whatever it says ends a text, but not the timing
    own = model.generate
    model.generate = lambda *args, **kwargs: seen.append(own(*args, **kwargs)) or seen[-1]
    text = torch.arange(5, 9)
    made = bench(model, None, decode_batches=(), generate_batches=(2,), text=text, **QUICK | {"prefill_tokens": ()})
    assert [tuple(ids.shape) for ids in seen] == [(2, 4 + 3)] * 4
    assert [(run.phase, run.size) for run in made.runs] == [("generate", 2)]
    assert made.to_dict()["decode"] == {}


def test_a_given_conversion_is_used(llama):
    asked = []

    def convert(model, dtype):
        asked.append(dtype)
        return llama().to(dtype)

    bench(llama(), None, dtypes=("bfloat16",), convert=convert, **QUICK)
    assert asked == [torch.bfloat16]


def test_peak_bytes_hold_the_weights_and_what_the_run_needs(llama):
    made = bench(llama(), None, prefill_tokens=(128,), decode_batches=())
    assert made.runs[0].peak_bytes >= weight_bytes(llama())


def test_encoders_prefill_but_do_not_decode():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(vocab_size=VOCAB, **sizes))
    assert bench(encoder, encoder, **QUICK | {"decode_batches": ()}).runs[1].tokens_per_s > 0
    with pytest.raises(FactorMixError, match="cannot decode"):
        bench(encoder, None, **QUICK)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtypes": ("float23",)}, "Did you mean 'float32'"),
        ({"threads": (0,)}, "threads received 0"),
        ({"repeats": 0}, "repeats received 0"),
        ({"decode_batches": (-1,)}, "decode size received -1"),
        ({"beside": ("active-with",)}, "Did you mean 'active-width'"),
        ({"beside": ("active-width",)}, "no sparse FFN"),
        ({"decode_batches": (), "prefill_tokens": ()}, "nothing to time"),
    ],
)
def test_impossible_settings_are_refused(llama, wrong, message):
    with pytest.raises(FactorMixError, match=message):
        bench(llama(), None, **QUICK | wrong)
