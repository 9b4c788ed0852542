"""What a partition needs to know of one FFN's neurons, streamed: memory does not grow with the calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

from factormix.ffn.site import Activation, FFNWeights
from factormix.run.errors import FactorMixError

SAMPLE = 4096  # tokens kept for the patterns


class ActivationStats:
    """Mean energy of all neurons over all tokens, and an even sample of the FFN's inputs.

    Attributes:
        weights: of the dense FFN.
        act: its activation function.
        tokens: how many tokens were seen.
        sample: (n, H), n <= 4,096 inputs, each seen token with equal probability (reservoir sampling).
    """

    def __init__(self, weights: FFNWeights, act: Activation, seed: int = 0, sample: int = SAMPLE) -> None:
        self.weights, self.act = weights, act
        self.tokens = 0
        self._shares, self._sums, self._squares = torch.zeros(3, self.inner, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._sample = sample
        self.sample = torch.empty(0, weights.up.shape[1])

    @property
    def inner(self) -> int:
        """I."""
        return len(self.weights.up)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add inputs of the FFN, x (T, H).

        Raises:
            FactorMixError: NaN or infinity among the neurons.
        """
        neurons = self.weights.neurons(x, self.act).float()  # (T, I)
        square = neurons.square()  # (T, I)
        share = relative(square * self.down_squares().to(x.device)).sum(0).cpu()  # (I,)
        if not bool(torch.isfinite(share).all()):
            raise FactorMixError(
                "NaN or infinity among the neurons on the calibration text; check the model, or use --dtype float32."
            )
        self._shares += share
        self._sums += neurons.sum(0).cpu()
        self._squares += square.sum(0).cpu()
        self.tokens += len(x)
        keys = torch.cat([self._keys, torch.rand(len(x), generator=self._generator)])  # n + T
        kept = keys.topk(min(self._sample, len(keys))).indices.sort().values  # the largest keys of all seen so far
        new = kept[kept >= len(self.sample)] - len(self.sample)
        old = self.sample[kept[kept < len(self.sample)]]
        self.sample = torch.cat([old, x[new.to(x.device)].float().cpu()])  # (n, H)
        self._keys = keys[kept]

    @property
    def energy(self) -> Tensor:
        """(I,) mean over tokens of neuron j's share of the token's energy, a_j^2 |d_j|^2 over its sum; sums to 1.

        Shares rather than energies: a few tokens (BOS above all) have a thousand times the energy of the others.
        """
        return (self._shares / max(self.tokens, 1)).float()

    @property
    def mean(self) -> Tensor:
        """(I,) mean of each neuron."""
        return (self._sums / max(self.tokens, 1)).float()

    @property
    def mean_square(self) -> Tensor:
        """(I,) mean of each neuron's square; massive tokens count as they are."""
        return (self._squares / max(self.tokens, 1)).float()

    def sampled_energy(self) -> Tensor:
        """(n, I) the same share at each token of the sample; rows sum to 1."""
        device, dtype = self.weights.up.device, self.weights.up.dtype
        neurons = self.weights.neurons(self.sample.to(device, dtype), self.act).float()  # (n, I)
        return relative(neurons.square().cpu() * self.down_squares())

    def down_squares(self) -> Tensor:
        """(I,) |d_j|^2, on the CPU."""
        return self.weights.down.float().square().sum(1).cpu()

    def most_important(self, count: int, score: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Indices of the `count` neurons with most energy, or of the highest `score` (I,), and of the others; both
        ascending."""
        order = (self.energy if score is None else score).argsort(descending=True, stable=True)
        return order[:count].sort().values, order[count:].sort().values


def relative(energy: Tensor) -> Tensor:
    """Each row (T, I) divided by its sum."""
    return energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
