"""Count the facts that a causal model recalls. A fact is ``{"prompt": ..., "targets": [...]}``.

    score = recall(model, tokenizer, read_documents("facts.jsonl"))
    score.exact, score.first_token          # shares, 0 to 1

A fact is recalled exactly if greedy decoding would write one of its targets: the model's most likely token is right at
every token of the target. Its first token is recalled if the most likely token is right at the first one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from factormix.data.facts import Fact, fact_of, padded
from factormix.data.text import Documents
from factormix.evaluate.causal import check_next_token
from factormix.run.errors import FactorMixError
from factormix.run.progress import progress

BATCH = 32  # rows in one forward
LONGEST = 512  # the most tokens of a prompt with its target


@dataclass(frozen=True)
class RecallScore:
    """How much of a list of facts a model recalls.

    Attributes:
        facts: number of facts asked.
        exact: share of facts recalled exactly, 0 to 1.
        first_token: share of facts whose first token is recalled, 0 to 1.
        loss: mean cross-entropy over all tokens of all targets, in nats per token.
    """

    facts: int
    exact: float
    first_token: float
    loss: float

    def to_dict(self) -> dict[str, float]:
        """The entry ``recall.<stem>.model``, which docs/json.md describes."""
        return asdict(self)


@torch.no_grad()
def recall(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Documents, *, limit: int = 2000, quiet: bool = True
) -> RecallScore:
    """Ask a causal language model for the targets of prompts.

    Args:
        model: a causal language model. It is in eval mode while it is asked.
        tokenizer: its fast tokenizer.
        facts: documents of the kind "knowledge".
        limit: the most facts that are asked, in the documents' order.
        quiet: show no progress line.

    Raises:
        FactorMixError: the documents are of another kind, or the model has no next-token logits.
    """
    if facts.kind != "knowledge":
        raise FactorMixError(f'{facts.name} is {facts.kind}; allowed: facts, lines of {{"prompt", "targets"}}.')
    check_next_token(model)
    records = facts.records[:limit]
    owners = [i for i, record in enumerate(records) for _ in record["targets"]]
    rows = [fact_of(r["prompt"], target, tokenizer, LONGEST) for r in records for target in r["targets"]]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    exact, first = torch.zeros(len(records), dtype=torch.bool), torch.zeros(len(records), dtype=torch.bool)
    losses: list[Tensor] = []
    was_training = model.training
    model.eval()
    try:
        for chosen in progress(batches, label=facts.name, total=len(batches), quiet=quiet):
            hits, nats = _asked(model, [rows[i] for i in chosen], tokenizer.pad_token_id or 0)
            losses.append(nats)
            for i, hit in zip(chosen, hits):
                exact[owners[i]] |= bool(hit.all())
                first[owners[i]] |= bool(hit[0])
    finally:
        model.train(was_training)
    shares = {"exact": float(exact.float().mean()), "first_token": float(first.float().mean())}
    return RecallScore(len(records), **shares, loss=float(torch.cat(losses).mean()))


def _asked(model: nn.Module, facts: list[Fact], pad: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Whether the most likely token is right at each token of a target, one tensor per fact; and all losses, nats."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in padded(facts, pad).items()}
    ids, counted = batch["input_ids"], batch["counted"][:, 1:]  # (B, L), (B, L - 1)
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]  # (B, L-1, V)
    scored, wanted = logits[counted].float(), ids[:, 1:][counted]  # (N, V), (N,)
    loss = nn.functional.cross_entropy(scored, wanted, reduction="none")  # (N,)
    return (scored.argmax(-1) == wanted).cpu().split(counted.sum(1).tolist()), loss.cpu()
