"""The Triton kernels against the reference: on a GPU where there is one, else in Triton's interpreter.

Triton is not installed for the ordinary tests; `make test-triton` fetches it and runs this file.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from factormix.experts import PackedExperts, gpu
from factormix.experts.reference import reference
from tests.nn.sparse import lone_ffn

pytestmark = pytest.mark.skipif(not gpu.INSTALLED, reason="Triton is not installed; `make test-triton` runs these")
WHERE = "cuda" if torch.cuda.is_available() else "cpu"  # tests/conftest.py switches the interpreter on
ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_in_the_interpreter() -> None:
    """The interpreter keeps bfloat16 as uint16 and multiplies matrices of it as integers: convert first."""
    if WHERE == "cuda":
        return
    import numpy
    from triton import language
    from triton.runtime import interpreter

    real = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        for side in (a, b):
            if side.dtype == language.bfloat16:
                side.data = (side.data.astype(numpy.uint32) << 16).view(numpy.float32)
                side.dtype = language.float32
        return real(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def pack(routed: int, width: int, hidden: int, gated: bool, bias: bool, act: str, dtype: torch.dtype) -> PackedExperts:
    rows = (2 if gated else 1) * width
    up, down = torch.randn(routed, rows, hidden) / hidden**0.5, torch.randn(routed, hidden, width) / width**0.5
    return PackedExperts(
        up.to(WHERE, dtype),
        down.to(WHERE, dtype),
        torch.randn(routed, rows).to(WHERE, dtype) if bias else None,
        act,
        gated,
    )


def plain(parts: PackedExperts) -> PackedExperts:
    """In float32 on the CPU: the same numbers, rounded as they were."""
    assert isinstance(parts.up, Tensor) and isinstance(parts.down, Tensor)
    bias = None if parts.up_bias is None else parts.up_bias.float().cpu()
    return PackedExperts(parts.up.float().cpu(), parts.down.float().cpu(), bias, parts.activation, parts.gated)


def wanted(
    x: Tensor, chosen: Tensor | None, scale: Tensor | None, experts: PackedExperts | None, shared: PackedExperts | None
) -> Tensor:
    single = x.float().cpu()
    want = torch.zeros_like(single)
    if experts is not None and chosen is not None:
        want += reference(single, chosen.cpu(), None if scale is None else scale.float().cpu(), plain(experts))
    if shared is not None:
        want += reference(single, torch.zeros(len(x), 1, dtype=torch.int64), None, plain(shared))
    return want


def relative(got: Tensor, want: Tensor) -> float:
    """Below 1e-4 float16 has too few bits for a relative error."""
    return float((got.float().cpu() - want).norm() / want.norm().clamp_min(1e-4))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decode_equals_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    tokens, hidden, width = draw(st.integers(1, gpu.TOKENS)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    routed = draw(st.integers(1, 9))
    active = draw(st.integers(1, routed))
    gated, bias, act = (
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(["silu", "gelu", "gelu_new", "relu"])),
    )
    dtype = draw(st.sampled_from(gpu.DTYPES))
    x = torch.randn(tokens, hidden).to(WHERE, dtype)
    experts = pack(routed, width, hidden, gated, bias, act, dtype) if draw(st.booleans()) else None
    other = draw(st.integers(1, 50))
    shared = pack(1, other, hidden, gated, bias, act, dtype) if experts is None or draw(st.booleans()) else None
    chosen = torch.rand(tokens, routed).topk(active, 1).indices.to(WHERE) if experts is not None else None
    scale = torch.rand(tokens, active).to(WHERE) if experts is not None and draw(st.booleans()) else None
    got = gpu.decode(x, chosen, scale, experts, shared)
    assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
    assert relative(got, wanted(x, chosen, scale, experts, shared)) < ERROR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("hidden, width", [(576, 96), (600, 352)])
def test_real_widths(hidden: int, width: int, tokens: int, dtype: torch.dtype) -> None:
    """More than one block of columns, and blocks that are not full."""
    torch.manual_seed(0)
    experts, shared = (pack(n, w, hidden, True, False, "silu", dtype) for n, w in ((3, width), (1, 2 * width)))
    x = torch.randn(tokens, hidden).to(WHERE, dtype)
    chosen = torch.rand(tokens, 3).topk(2, 1).indices.to(WHERE)
    assert (
        relative(gpu.decode(x, chosen, None, experts, shared), wanted(x, chosen, None, experts, shared)) < ERROR[dtype]
    )


@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_nobody_chose_do_not_run(tokens: int) -> None:
    experts = pack(5, 4, 6, True, True, "silu", torch.float32)
    x, chosen = torch.randn(tokens, 6).to(WHERE), torch.tensor([[3, 1]]).expand(tokens, 2).to(WHERE)
    want = wanted(x, chosen, None, experts, None)
    for tensor in (experts.up, experts.down, experts.up_bias):
        tensor[[0, 2, 4]] = torch.nan  # type: ignore[index]
    assert relative(gpu.decode(x, chosen, None, experts, None), want) < 1e-5


@pytest.mark.parametrize("tokens", [1, 6])
def test_views_and_the_order_of_the_choice(tokens: int) -> None:
    torch.manual_seed(0)
    experts = pack(5, 4, 6, True, False, "gelu", torch.float32)
    wide = torch.randn(tokens, 12).to(WHERE)
    chosen, scale = torch.rand(tokens, 5).topk(3, 1).indices.to(WHERE), torch.rand(tokens, 3).to(WHERE)
    got = gpu.decode(wide[:, ::2], chosen.flip(1), scale.flip(1), experts, None)
    assert relative(got, wanted(wide[:, ::2], chosen, scale, experts, None)) < 1e-5


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_router_scores_and_chooses(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999)))
    tokens, hidden, routed = draw(st.integers(1, 20)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    active = draw(st.integers(1, routed))
    x = torch.randn(tokens, hidden).to(WHERE, draw(st.sampled_from(gpu.DTYPES)))
    weight = torch.randn(routed, hidden).to(WHERE, draw(st.sampled_from(gpu.DTYPES)))
    scores, chosen = gpu.route(x, weight, active)
    exact = x.double() @ weight.double().T
    assert scores.dtype == torch.float32 and chosen.dtype == torch.int64
    assert torch.allclose(scores.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(scores.gather(1, chosen), scores.topk(active, 1).values)
    assert all(len(set(row)) == active for row in chosen.tolist())


def test_the_router_takes_the_first_of_equals_and_an_expert_that_exists() -> None:
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.5], [1.0]]).to(WHERE)
    x = torch.tensor([[1.0], [torch.nan], [0.0], [-torch.inf]]).to(WHERE)
    chosen = gpu.route(x, weight, 3)[1].tolist()
    assert chosen[0] == [1, 2, 4] and chosen[2] == [0, 1, 2]
    assert all(sorted(set(row)) == sorted(row) and max(row) < 5 for row in chosen)


def test_the_router_orders_as_torch_sort_does_nan_and_infinities_included() -> None:
    weight = torch.tensor([[1.0], [torch.nan], [-torch.inf], [torch.inf], [2.0], [torch.nan]]).to(WHERE)
    x = torch.tensor([[1.0], [-1.0], [torch.nan]]).to(WHERE)
    scores, chosen = gpu.route(x, weight, 6)
    assert torch.equal(chosen, scores.sort(dim=1, descending=True, stable=True).indices)
    assert chosen[0].tolist() == [1, 5, 3, 4, 0, 2]


def test_equal_rows_have_equal_scores_in_any_batch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 300).to(WHERE), torch.randn(12, 300).to(WHERE)
    together = gpu.route(x, weight, 4)[0]
    assert all(torch.equal(gpu.route(x[i : i + 1], weight, 4)[0][0], together[i]) for i in range(20))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a GPU, and no C++ operator in the way."""
    monkeypatch.setattr(gpu, "DEVICE", WHERE)
    monkeypatch.setenv("FACTORMIX_NATIVE", "0")
    gpu.native.library.cache_clear()
    yield
    monkeypatch.undo()
    gpu.native.library.cache_clear()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("layout", ["S1A2E5", "S0A2E4", "S4A0E4"])
def test_a_sparse_ffn_runs_on_them(here: None, layout: str, tokens: int) -> None:
    ffn, x = lone_ffn(layout=layout, biased=True, output_weight="paper").to(WHERE), torch.randn(tokens, 12).to(WHERE)
    want = ffn(x).detach()  # with gradients, so by PyTorch's operators
    with torch.no_grad():
        assert torch.allclose(ffn(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_compiled_sparse_ffn_holds_them_as_operators(here: None, tokens: int) -> None:
    torch._dynamo.reset()
    ffn, x = lone_ffn(biased=True).to(WHERE), torch.randn(tokens, 12).to(WHERE)
    graphs: list[str] = []

    def backend(module, _):  # type: ignore[no-untyped-def]
        graphs.extend(str(node.target) for node in module.graph.nodes if "gpu_" in str(node.target))
        return module

    with torch.no_grad():
        assert torch.equal(torch.compile(ffn, backend=backend, fullgraph=True)(x), ffn(x))
    assert graphs == ["factormix.gpu_route", "factormix.gpu_decode"]


def test_the_operators_are_sound() -> None:
    torch.manual_seed(0)
    parts, shared = (pack(n, 4, 6, True, True, "silu", torch.float32) for n in (3, 1))
    x, chosen = torch.randn(2, 6).to(WHERE), torch.tensor([[0, 2], [1, 0]]).to(WHERE)
    weights = (parts.up, parts.down, parts.up_bias, shared.up, shared.down, shared.up_bias)
    torch.library.opcheck(torch.ops.factormix.gpu_decode, (x, chosen, None, *weights, "silu", True))
    torch.library.opcheck(torch.ops.factormix.gpu_route, (x, torch.randn(5, 6).to(WHERE), 2))


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from factormix.experts import decode_triton as kernels

def build(kernel, capability, dtype, constants):
    kind = {"chosen_ptr": "*i64", "neurons_ptr": "*fp32", "scores_ptr": "*fp32"}
    names = kernel.arg_names
    types = {n: kind.get(n, "*" + dtype if n.endswith("_ptr") else "i32") for n in names}
    types.update(dict.fromkeys(constants, "constexpr"))
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants, attrs={})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

capability, tokens = int(sys.argv[1]), int(sys.argv[2])
for dtype in ("bf16", "fp32"):
    m, n, c = (1, 4, 512) if tokens == 1 else (16, 32, 128 if dtype == "bf16" else 32)
    common = {"K": 4, "K_PAD": 4, "M": m, "C": c, **({"T": 1} if tokens == 1 else {})}  # Triton makes a 1 a constant
    flags = {"GATED": True, "BIASED": True, "SCALED": True, "KIND": 1}
    build(kernels.up, capability, dtype, {**common, **flags, "N": n})
    build(kernels.down, capability, dtype, {**common, "N": min(n, 16)})
    build(kernels.route, capability, dtype, {"R": 12, "K": 4, "R_PAD": 16, "C": 512})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_they_compile_to_machine_code_without_a_gpu(capability: int, tokens: int) -> None:
    """The interpreter takes more than the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, str(capability), str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
