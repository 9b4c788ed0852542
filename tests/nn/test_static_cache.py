"""Compiled decoding with a static cache: one graph, no break, the same logits; what a CUDA graph needs on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from factormix.experts import native
from tests.nn.sparse import twins


def logits(model: PreTrainedModel, forward: object, steps: int = 4) -> Tensor:
    """Logits of single tokens after a prompt of six, (steps, V)."""
    ids = torch.randint(3, 90, (1, 6 + steps), generator=torch.Generator().manual_seed(4))
    cache, found = StaticCache(model.config, max_cache_len=16), []
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        for t in range(6, 6 + steps):
            found.append(forward(ids[:, t : t + 1], past_key_values=cache).logits[0, -1])  # type: ignore[operator]
    return torch.stack(found)


WHOLE = pytest.param("factormix.ffn", marks=pytest.mark.skipif(native.most_tokens() <= 4, reason="not built here"))


@pytest.mark.parametrize("operator", [WHOLE, "factormix.run_experts.default"])
@pytest.mark.parametrize("family, layout", [("llama", "S1A2E4"), ("qwen3", "S0A1E4")])
def test_decoding_with_a_static_cache_is_one_graph(
    family: str, layout: str, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one opaque operator a layer: which experts run is not the graph's to know."""
    torch._dynamo.reset()
    if operator != "factormix.ffn":
        monkeypatch.setattr(native, "most_tokens", lambda: 0)
    _, sparse = twins(family, layout)
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(module)
        return module

    got = logits(sparse, torch.compile(sparse, backend=backend, fullgraph=True))
    assert torch.allclose(got, logits(sparse, sparse), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1  # every step runs the first one's
    ours = [str(node.target) for node in graphs[0].graph.nodes if str(node.target).startswith("factormix.")]
    assert ours == [operator] * len(sparse.sparse_ffns())


def test_the_static_cache_gives_the_dynamic_ones_logits() -> None:
    _, sparse = twins("llama", "S1A2E4")
    ids = torch.randint(3, 90, (1, 10), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.allclose(logits(sparse, sparse), sparse(ids).logits[0, 6:], rtol=1e-4, atol=1e-5)


def test_generate_compiles_by_itself_with_a_static_cache() -> None:
    """transformers compiles the decoding step when asked by `compile_config`; backends that need no compiler do."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    _, sparse = twins("llama", "S1A2E4")
    ids = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(4))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None, dynamic=False)
    config._compile_all_devices = True
    got = sparse.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(got, sparse.generate(ids, **options))
