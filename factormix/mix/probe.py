"""Start the head at a linear probe of the states that backbone and domains give before training.

    W, b = argmin  loss(W z + b, y) + 5000 |W|^2 / N,    z = (state - mean) / spread, dimension by dimension

The problem is convex, so the start does not depend on a seed. Training then starts from the information in the states,
instead of pulling them towards a random head (linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054).
The ridge is strong because a head that already fits its few examples leaves the adapter nothing to learn
(docs/results.md). Each dimension is divided by its own spread, because a few dimensions of a decoder's states are ten
times as large as the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from factormix.mix.examples import Example, by_example, collate
from factormix.mix.mix_model import MixModel
from factormix.mix.score import in_batches
from factormix.mix.task import Task

EXAMPLES = 2048  # the most examples; more change a linear head little
ITERATIONS = 200  # the most iterations of L-BFGS
RIDGE = 5000.0  # weight of |W|^2 / N
LEAST_SPREAD = 1e-3  # the smallest spread, as a share of the mean over dimensions


def probe_head(
    mix: MixModel, examples: Sequence[Example], task: Task, pad: int, batch_size: int, seed: int = 0
) -> None:
    """Fit the head to the states, in place.

    Args:
        mix: a model with a head.
        examples: encoded examples with targets. If there are more than `EXAMPLES`, so many are drawn.
        task: gives the loss.
        pad: id of the padding token.
        batch_size: examples that run together.
        seed: seed of the draw.
    """
    assert mix.head is not None
    chosen = list(examples)
    if len(chosen) > EXAMPLES:
        chosen = random.Random(seed).sample(chosen, EXAMPLES)
    states = pooled_states(mix, chosen, task, pad, batch_size).double()  # (rows, H)
    batch = collate(chosen, task, pad)
    targets = batch["targets"]
    mean, spread = states.mean(0), states.std(0)  # (H,), (H,)
    spread = spread.clamp(min=float(LEAST_SPREAD * spread.mean()) or 1.0)  # a dimension may be constant
    z = (states - mean) / spread  # (rows, H)
    weight = torch.zeros(mix.head.weight.shape, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        logits = by_example(z @ weight.T + bias, batch["sizes"])  # (B, outputs or choices)
        loss = task.loss(logits, targets.double() if targets.is_floating_point() else targets)
        loss = loss + RIDGE * weight.square().sum() / len(chosen)
        loss.backward()
        return loss

    optimiser.step(objective)  # type: ignore[arg-type]
    with torch.no_grad():
        mix.head.weight.copy_(weight / spread)
        mix.head.bias.copy_(bias - weight / spread @ mean)


def pooled_states(mix: MixModel, examples: Sequence[Example], task: Task, pad: int, batch_size: int) -> Tensor:
    """The states that the head reads, one for each row of every example, in order: (rows, H) float32 on the CPU."""
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    for chosen, ids, mask, sizes in in_batches(mix, examples, task, pad, batch_size):
        parts = mix.pooled(ids, mask).float().cpu().split(sizes.tolist())
        for i, part in zip(chosen, parts):
            found[i] = part  # (rows of the example, H)
    return torch.cat(found)
