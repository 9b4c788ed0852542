"""`factormix inspect`: where the FFNs are, what they cost, and how much sparsity could gain; no weights are read."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from transformers import CONFIG_MAPPING, PretrainedConfig

from factormix.checkpoint import FactorMixConfig
from factormix.cli import options
from factormix.cli.models import locate, read_config
from factormix.ffn.cost import Inspection, inspect_model
from factormix.nn import SparseSpec

SCHEMA_VERSION = 1
FRACTIONS = (0.5, 0.25)


def inspect(
    model: options.Model,
    active: Annotated[
        list[float] | None, typer.Option("--active", help="active fraction to give the speed limit of; repeat for more")
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = None,
) -> None:
    """List the FFNs of MODEL and their share of parameters and FLOPs, from its config alone."""
    options.check_json(json)
    config = read_config(locate(model, quiet))
    found = inspect_model(dense_config(config))
    limits = [found.speed_limit(fraction) for fraction in active or FRACTIONS]
    sparse = _sparse(config)
    values = {
        "schema_version": SCHEMA_VERSION,
        **found.to_dict(),
        "speed_limits": [limit.to_dict() for limit in limits],
    }
    options.put_json(json, {**values, "sparse": sparse})
    lines = [f"{found.model_class} ({found.model_type})", *site_table(found), *_shares(found)]
    lines.append("no sparse FFN can be faster than (the rest of the model costs what it costs):")
    rows = [("active", "prefill", "decode")]
    rows += [(f"{x.active_fraction:g}", f"{x.prefill:.2f} x", f"{x.decode:.2f} x") for x in limits]
    lines += options.aligned(rows)
    if sparse:
        lines += ["made sparse:", *options.aligned(_sparse_rows(sparse))]
    typer.echo("\n".join(lines))


def dense_config(config: PretrainedConfig) -> PretrainedConfig:
    """The dense model's config, also of a FactorMix model."""
    if not isinstance(config, FactorMixConfig):
        return config
    return CONFIG_MAPPING[config.base_config["model_type"]].from_dict(config.base_config)


def site_table(found: Inspection) -> list[str]:
    """One line for each group of like FFNs."""
    rows = [("stack", "layers", "FFNs", "H", "I", "activation", "form", "kind", "parameters each")]
    for group in found.groups:
        layers = f"{group.layers[0]}-{group.layers[-1]}" if len(group.layers) > 1 else str(group.layers[0])
        used = "" if group.use_count == 1 else f" x {group.use_count} uses"
        form = "gated" if group.gated else "plain"
        rows.append((
            group.stack, layers, f"{group.sites}{used}", str(group.hidden), str(group.inner), group.activation, form,
            group.kind, f"{group.parameters:,}",
        ))  # fmt: skip
    return options.aligned(rows)


def _shares(found: Inspection) -> list[str]:
    return [
        f"parameters: {found.parameters:,}, of these in FFNs {100 * found.parameter_share:.1f} %",
        f"FLOPs a token: {found.flops_per_token:,}, of these in FFNs {100 * found.flops_share:.1f} %",
        f"parameters read a decoded token: {found.read_parameters:,}, of these in FFNs {100 * found.read_share:.1f} %",
    ]


def _sparse(config: PretrainedConfig) -> list[dict[str, Any]]:
    """One row a sparse FFN of a FactorMix model; empty for a dense one."""
    if not isinstance(config, FactorMixConfig):
        return []
    reports = {row["site"]: row for row in config.factormix.get("made_by", {}).get("sites", [])}
    rows = []
    for index, spec in config.factormix["sites"].items():
        report = reports.get(int(index), {})
        measured = {key: report.get(key) for key in ("recall", "captured", "error_before", "error_after")}
        rows.append({"site": int(index), **SparseSpec.from_dict(spec).to_dict(), **measured})
    return rows


def _sparse_rows(sparse: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("FFN", "layout", "width", "output weight", "recall", "captured", "error")]
    for row in sparse:
        measured = ("-" if row[key] is None else f"{row[key]:.3f}" for key in ("recall", "captured", "error_after"))
        layout = f"S{row['shared']}A{row['active']}E{row['slices']}"
        rows.append((str(row["site"]), layout, str(row["width"]), row["output_weight"], *measured))
    return rows
