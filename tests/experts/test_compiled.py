"""Under torch.compile a whole sparse FFN is one opaque operator that ends in eager mode's C++ call, or steps aside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from factormix.experts import native
from factormix.nn import SparseFFN
from factormix.nn.router import make_router
from tests.experts.test_native import CHANGED, TOUCHED
from tests.nn.sparse import lone_ffn

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def graphs() -> list[set[str]]:
    """What is called in each graph that was compiled."""
    return []


@pytest.fixture
def compile(graphs: list[set[str]]):  # type: ignore[no-untyped-def]
    """torch.compile by a backend that runs each graph as it is and notes it."""

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append({str(node.target) for node in module.graph.nodes if node.op.startswith("call")})
        return module

    return lambda ffn, **options: torch.compile(ffn, backend=backend, fullgraph=True, **options)


WHOLE, EXPERTS = "factormix.ffn", "factormix.run_experts.default"


def whole(graph: set[str]) -> bool:
    """Whether the one operator is all that computes anything, but for the addition of the output bias."""
    return WHOLE in graph and not graph & {"sort", "to", "<built-in function linear>", EXPERTS}


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize(
    "layout, gate", [("S1A2E5", "hard"), ("S0A2E4", "paper"), ("S1A1E3", "soft"), ("S4A0E4", "hard")]
)
def test_one_operator_and_eager_modes_numbers(compile, graphs, layout: str, gate: str, dtype: torch.dtype) -> None:
    ffn = lone_ffn(layout=layout, biased=True, output_weight=gate).to(dtype)
    run = compile(ffn)
    for shape in ((1,), (3,), (17,), (2, 5)):
        x = torch.randn(*shape, 12).to(dtype)
        assert torch.equal(run(x), ffn(x))
    assert all(map(whole, graphs))


def test_one_graph_for_any_number_of_tokens(compile, graphs) -> None:
    ffn = lone_ffn()
    run = compile(ffn, dynamic=True)
    for count in (2, 7, 40):
        x = torch.randn(count, 12)
        assert torch.equal(run(x), ffn(x))
    assert len(graphs) == 1 and whole(graphs[0])


def test_rows_that_do_not_lie_in_order(compile) -> None:
    ffn, x = lone_ffn(), torch.randn(12, 7).T
    y = compile(ffn)(x)
    assert torch.equal(y, ffn(x)) and y.is_contiguous()


def test_by_pytorchs_own_backend() -> None:
    ffn, x = lone_ffn(biased=True), torch.randn(3, 12)
    with torch.inference_mode():
        assert torch.equal(torch.compile(ffn, backend="aot_eager", fullgraph=True)(x), ffn(x))


@pytest.mark.parametrize("layout", ["S1A2E5", "S0A2E4", "S4A0E4"])
def test_the_operator_is_sound(layout: str) -> None:
    ffn, x = lone_ffn(layout=layout), torch.randn(3, 12)
    experts, shared = ffn._packed()
    parts = [part for each in (experts, shared) for part in ((each.up, each.down, None) if each else (None,) * 3)]
    router, *constants = ffn._routing()
    torch.library.opcheck(torch.ops.factormix.ffn, (x, *parts, router, "silu", True, *constants))


def _hooked_router(ffn: SparseFFN) -> None:
    ffn.router.register_forward_hook(lambda *_: None)


def _other_router(ffn: SparseFFN) -> None:
    ffn.router = make_router("mlp", 12, 4, 2, "silu", True)


ASIDE = {
    **{name: change for name, change in TOUCHED.items() if name != "another dtype"},
    "a hook on the router": lambda ffn: ffn.router.register_forward_hook(lambda *_: None),
    "a router of another kind": _other_router,
    "a router in another dtype": lambda ffn: ffn.router.double(),
}


@pytest.mark.parametrize("what", ASIDE)
def test_it_steps_aside(compile, graphs, what: str) -> None:
    ffn, x = lone_ffn(), torch.randn(3, 12)
    ASIDE[what](ffn)
    assert torch.allclose(compile(ffn)(x), ffn(x), rtol=1e-5, atol=1e-6)
    assert graphs and not any(WHOLE in graph for graph in graphs)


@pytest.mark.parametrize("most", [0, native.FEW])
def test_without_the_operator_for_any_number_of_tokens(compile, graphs, most: int, monkeypatch) -> None:
    monkeypatch.setattr(native, "most_tokens", lambda: most)
    ffn, x = lone_ffn(), torch.randn(3, 12)
    assert torch.allclose(compile(ffn)(x), ffn(x), rtol=1e-5, atol=1e-6)
    assert EXPERTS in graphs[0]


def test_gradients_and_autocast(compile, graphs) -> None:
    ffn, x = lone_ffn(), torch.randn(3, 12)
    run = torch.compile(ffn, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert compile(ffn)(x).dtype == torch.bfloat16
    with torch.enable_grad():
        run(x).sum().backward()
    assert ffn.shared.up_proj.weight.grad is not None and not any(WHOLE in graph for graph in graphs)


def test_who_counts_operations_sees_them() -> None:
    ffn, x = lone_ffn(), torch.randn(3, 12)
    ffn.compile(backend="eager")
    ffn(x)
    with FlopCounterMode(display=False) as counter:
        ffn(x)
    assert counter.get_total_flops()


@pytest.mark.parametrize("what", [name for name in CHANGED if name not in ("other data", "another dtype")])
def test_what_changes_after_compiling_is_seen(compile, what: str) -> None:
    ffn, x = lone_ffn(), torch.randn(3, 12)
    run = compile(ffn)
    before = run(x)
    CHANGED[what](ffn)
    got = run(x)
    assert torch.allclose(got, ffn(x), rtol=1e-5, atol=1e-6) and not torch.equal(got, before)
