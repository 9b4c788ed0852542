"""Export a factored model as a stock architecture that plain transformers, vLLM and llama.cpp load."""

from factormix.export.card import Origin
from factormix.export.containers import CONTAINERS
from factormix.export.export import Exported, export_model
from factormix.export.parity import Parity

__all__ = ["CONTAINERS", "Exported", "Origin", "Parity", "export_model"]
