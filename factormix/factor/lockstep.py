"""Lockstep: the model's own forward over every calibration batch, all of them halted at the same FFN.

Layer-wise fitting needs the inputs of FFN i at the student's own states, that is after FFNs 0..i-1 were replaced. So
each batch's forward runs in a coroutine of its own (a greenlet: it can halt amid any model's code); at a site it
deposits the FFN's input and waits. When all wait, the caller fits and replaces that FFN, and lets them run on with the
new one to the next site. Any architecture works, encoder-decoders too; the whole calibration costs one forward.

Memory: the live states of every batch, about 12 H bytes a token in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from greenlet import greenlet
from torch import Tensor, nn

from factormix.ffn import FFNSite, FFNWeights, isolate, swap, weights
from factormix.nn import SparseFFN

Batch = Mapping[str, Tensor]


class _Runner:
    """One batch's forward in a greenlet: it runs when resumed, and stands still between two FFNs.

    Greenlets share the caller's thread, and with it torch's workers; but also torch's grad mode, which is thus put
    right at each switch.
    """

    def __init__(self, forward: Callable[[], object]) -> None:
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self._greenlet = greenlet(self._run)
        self._forward = forward

    @torch.no_grad()
    def _run(self) -> None:
        self._forward()

    def resume(self) -> None:
        """Let it run to its next halt, or to its end. What the forward raises, this raises."""
        grad = torch.is_grad_enabled()
        try:
            self._greenlet.switch()
        finally:
            torch.set_grad_enabled(grad)

    def halt(self, x: Tensor) -> Tensor:
        """Called by the forward at a site: hand over x, wait, and return what the caller left as output."""
        self.input = x
        self._greenlet.parent.switch()
        torch.set_grad_enabled(False)
        output, self.output = self.output, None
        assert output is not None
        return output

    def abandon(self) -> None:
        """End a forward that nobody needs any more, wherever it stands."""
        grad = torch.is_grad_enabled()
        self._greenlet.throw()
        torch.set_grad_enabled(grad)


class _Halt(nn.Module):
    """Stands at a site: stops a runner at the first call, later calls (a shared FFN) pass through to the new FFN."""

    def __init__(self, current: Callable[[], _Runner]) -> None:
        super().__init__()
        self._current = current
        self.new: nn.Module | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.new is not None:
            return cast(Tensor, self.new(hidden_states))
        return self._current().halt(hidden_states)


class Lockstep:
    """Run `model` over `batches`, halting at each of `sites` in turn.

    with Lockstep(model, sites, batches) as steps:
        for site in sites:
            inputs = steps.inputs(site)      # one tensor (..., H) a batch
            steps.replace(site, new_ffn)

    On exit, replaced sites hold their new FFN and the others their old one.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[FFNSite],
        batches: Sequence[Batch],
        done: Mapping[int, nn.Module] | None = None,
    ) -> None:
        """`done` holds new FFNs by site index for sites that need no halt: a resumed run."""
        self.model, self.sites, self.batches = model, list(sites), list(batches)
        self._done = dict(done or {})
        self._old: dict[int, nn.Module] = {}
        self._weights: dict[int, FFNWeights] = {}
        self._halts: dict[int, _Halt] = {}
        self._runners: list[_Runner] = []
        self._running: _Runner | None = None

    def __enter__(self) -> Lockstep:
        for site in self.sites:
            halt = _Halt(lambda: cast(_Runner, self._running))
            halt.new = self._done.get(site.index)
            if not isinstance(isolate(self.model, site), SparseFFN):
                self._weights[site.index] = weights(self.model, site)
            self._old[site.index], self._halts[site.index] = swap(self.model, site, halt), halt
        self._runners = [_Runner(lambda b=b: self.model(**b)) for b in self.batches]  # type: ignore[misc]
        return self

    def inputs(self, site: FFNSite) -> list[Tensor]:
        """The inputs (..., H) of this FFN, one a batch. Sites must be asked for in their order."""
        for runner in self._runners:
            runner.input = None
            self._running = runner
            runner.resume()
        found = [runner.input for runner in self._runners]
        assert all(x is not None for x in found), f"a forward ended before {site.name}"
        return cast(list[Tensor], found)

    def replace(self, site: FFNSite, new: nn.Module) -> None:
        """Put `new` at the site; every halted forward gets ``new(x)`` and may go on."""
        self._halts[site.index].new = new
        for runner in self._runners:
            assert runner.input is not None
            with torch.no_grad():
                runner.output = new(runner.input)
            runner.input = None

    def weights(self, site: FFNSite) -> FFNWeights:
        """The weights of the FFN that stood at the site, a dense one."""
        return self._weights[site.index]

    def old(self, site: FFNSite) -> nn.Module:
        """The FFN that stood at the site."""
        return self._old[site.index]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self._runners:
            runner.abandon()
        for site in self.sites:
            new = self._halts[site.index].new
            swap(self.model, site, self._old[site.index] if new is None else new)
        self._weights.clear()


def batches_of(model: Any, input_ids: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Forward arguments for windows (N, L), `size` windows a batch, cache off.

    An encoder-decoder reads the first half of each window and decodes the second.
    """
    found: list[dict[str, Any]] = []
    for ids in input_ids.to(model.device).split(size):
        if model.config.is_encoder_decoder:
            half = ids.shape[1] // 2
            found.append({"input_ids": ids[:, :half], "decoder_input_ids": ids[:, half:], "use_cache": False})
        elif getattr(model.config, "is_decoder", False) or hasattr(model.config.get_text_config(), "use_cache"):
            found.append({"input_ids": ids, "use_cache": False})
        else:
            found.append({"input_ids": ids})
    return found
