"""What a factorisation or a healing would do, by arithmetic: shown by --dry-run and by `validate`."""

from __future__ import annotations

from collections import Counter

from transformers import PretrainedConfig

from factormix.checkpoint import FactorMixConfig
from factormix.cli.inspect import dense_config, site_table
from factormix.factor.allocation import TOKENS
from factormix.factor.config import FactorConfig, HealConfig
from factormix.factor.keep import check_keep, kept_slices
from factormix.ffn.cost import Inspection, inspect_model
from factormix.nn import Layout, SparseSpec
from factormix.run.errors import FactorMixError
from factormix.train import step_tokens

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINING_BYTES = 16  # a trained parameter: float32 gradient, two Adam moments, and a copy while a checkpoint is written
STATE_BYTES = 12  # a token and hidden unit: the live states of a halted forward
GRAPH_STATES = (20, 6)  # of a layer in autograd's graph: tensors (T, H) and (T, I), in bfloat16
LOGITS = 3  # tensors (T, V) in float32: logits, log-probabilities, their gradient


def describe_layout(found: Inspection, config: FactorConfig) -> list[str]:
    """How every group of FFNs is cut, with the numbers; and the most that the speed can gain.

    Raises:
        FactorMixError: a layout that does not divide an FFN.
    """
    cut = config.cut
    lines = [f"{found.model_class} ({found.model_type})", *site_table(found), f"layout {cut}:"]
    for group in found.groups:
        width = cut.width(group.inner)
        shared, active = cut.shared * width, cut.active * width
        lines.append(
            f"  I = {group.inner} = {cut.slices} slices of {width}: {cut.shared} shared ({shared} neurons), "
            f"{cut.routed} routed experts, {cut.active} of them for a token ({active} neurons)"
        )
    if config.shares_out:
        lines.append(
            "  allocation global: that is the mean; FFNs whose errors cost more keep more slices active, others fewer"
        )
    limit = found.speed_limit(cut.active_fraction)
    lines.append(
        f"  active fraction ({cut.shared} + {cut.active}) / {cut.slices} = {cut.active_fraction:.4g}; at most "
        f"{limit.decode:.2f} x faster decoding, {limit.prefill:.2f} x faster prefill"
    )
    return lines


def describe_keep(model: PretrainedConfig, config: FactorConfig) -> list[str]:
    """What stays of a factored model's FFNs where experts are kept for a task; `model` is its config.

    Raises:
        FactorMixError: it is dense, or the layout cannot be kept of it.
    """
    if not isinstance(model, FactorMixConfig):
        raise FactorMixError(f"keep_experts_for needs a factored model, this {model.model_type} is dense: factor it.")
    specs = {int(index): SparseSpec.from_dict(spec) for index, spec in model.factormix["sites"].items()}
    check_keep(config, specs)
    kept, lines = kept_slices(config, specs), []
    for (old, slices), count in Counter((specs[index].layout, slices) for index, slices in kept.items()).items():
        new = Layout(slices, 0, old.slices)
        lines.append(
            f"{count} FFNs, {old} -> {new}: the {old.shared} shared slices and the {slices - old.shared} of "
            f"{old.routed} experts that serve the text best, for all tokens: {new.active_fraction:.4g} of the neurons"
        )
    if len(kept) < len(specs):
        lines.append(f"{len(specs) - len(kept)} FFNs that route nothing stay as they are")
    return lines


def describe_healing(
    sparse: PretrainedConfig, dense: PretrainedConfig | None, config: HealConfig, window: int, dtype: str = "float32"
) -> list[str]:
    """What healing comes to, from the configs of the sparse model and, where it is known, the dense one.

    Raises:
        FactorMixError: `sparse` is dense.
    """
    if not isinstance(sparse, FactorMixConfig):
        raise FactorMixError(f"this {sparse.model_type} is dense, there is nothing to heal; `factormix factor` it.")
    step = step_tokens(config.batch_tokens, window)
    steps, sites = config.tokens // step, len(sparse.factormix["sites"])
    lines = [
        f"healing {sites} sparse FFNs on {steps * step:,} tokens in windows of {window}: {steps:,} steps of {step:,}, "
        f"a checkpoint every {config.save_steps}"
    ]
    if dense is not None:
        found = inspect_model(dense_config(dense))
        size = ELEMENT_BYTES.get(dtype, 4)
        lines.append(
            _memory(found.parameters * size + _training_bytes(found, size) + _graph_bytes(found, window), dtype)
        )
    return lines


def estimated_bytes(found: Inspection, config: FactorConfig, dtype: str) -> int:
    """Peak memory of the factorisation, roughly (SmolLM2 takes a fifth more than this and torch).

    The model, one dense FFN beside its sparse one, calibration states, and the graph of a window where gradients cross
    layers (allocation, healing); what is freed in between is not given back, so the parts add up.
    """
    size = ELEMENT_BYTES.get(dtype, 4)
    hidden = max(group.hidden for group in found.groups)
    inner = max(group.inner for group in found.groups)
    largest = max(group.parameters for group in found.groups)
    states = config.tokens * hidden * (STATE_BYTES + 3 * size)  # halted forwards; inputs and outputs of one FFN
    fitting = inner * inner * 20 if config.layer_fit else 0  # gram, scaled copy and factor, in float32 and float64
    total = found.parameters * size + largest * size + states + fitting
    if config.heal.tokens:
        total += _training_bytes(found, size)
    if config.shares_out:
        sites = sum(group.sites for group in found.groups)
        total += min(config.tokens, TOKENS) * hidden * sites * 4  # bfloat16 inputs and gradients of all FFNs
    if config.shares_out or config.heal.tokens:
        total += _graph_bytes(found, config.window)
    return total


def _training_bytes(found: Inspection, size: int) -> int:
    """The FFNs once more, dense beside sparse, and what training the sparse ones holds."""
    return found.ffn_parameters * (size + TRAINING_BYTES)


def _graph_bytes(found: Inspection, window: int) -> int:
    """A window in autograd's graph, and the weights in bfloat16."""
    of_hidden, of_inner = GRAPH_STATES
    layers = sum(group.sites * (of_hidden * group.hidden + of_inner * group.inner) * 2 for group in found.groups)
    vocabulary = found.embedding_parameters // max(group.hidden for group in found.groups)
    return window * (layers + LOGITS * 4 * vocabulary) + found.parameters * 2


def _memory(total: int, dtype: str) -> str:
    return f"memory, estimated: {total / 2**30:.2f} GiB in {dtype}, torch not counted"


def describe_run(found: Inspection, config: FactorConfig, dtype: str) -> list[str]:
    """The plan in full: sites, layout, tokens, memory."""
    fit = "router and layer fit" if config.layer_fit else "router fit"
    lines = [
        *describe_layout(found, config),
        f"calibration: {config.tokens:,} tokens in windows of {config.window}; partition {config.partition}, {fit}",
    ]
    if config.heal.tokens:
        step = step_tokens(config.heal.batch_tokens, config.window)
        lines.append(f"healing: {config.heal.tokens // step * step:,} tokens, {step:,} a step")
    lines.append(_memory(estimated_bytes(found, config, dtype), dtype))
    return lines
