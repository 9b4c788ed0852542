"""A masked language model made sparse, healed and judged from the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.tiny import save_tiny

CUT = "--tokens 512 --window 32 --fit-passes 1 --router-steps 5 --allocation uniform --quiet".split()


def test_factored_and_judged_by_masked_tokens(tmp_path: Path, text: Path, run: Callable[..., str]) -> None:
    bert = save_tiny("bert", tmp_path / "bert")
    common = ["--against", bert, "--text", text, "--window", "32", "--tokens", "2048", "--quiet"]
    run("factor", bert, "-o", "whole", "--layout", "S1A3E4", "--text", text, *CUT)
    run("factor", bert, "-o", "half", "--layout", "S1A1E4", "--text", text, *CUT)
    few = "--tokens 512 --window 32 --batch-tokens 64 --quiet".split()
    run("heal", "half", "-o", "healed", "--against", bert, "--text", text, *few)
    ratios = {}
    for name in ("whole", "half", "healed"):
        run("eval", name, *common, "--json", f"{name}.json")
        found = json.loads(Path(f"{name}.json").read_text())
        assert found["predicts"] == "masked" and found["in_domain"] == ["words"]
        ratios[name] = found["perplexity"]["words"]["ratio"]
    assert ratios["whole"] == pytest.approx(1.0, abs=1e-4)
    assert abs(ratios["half"] - 1) > 1e-3 and ratios["healed"] != ratios["half"]
