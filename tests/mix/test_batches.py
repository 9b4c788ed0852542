"""Knowledge as micro-batches: text, facts whose object alone counts, both, and general text beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from factormix import FactorMixError
from factormix.mix.batches import Stage1Batches, fact_of, stage1_batches
from tests.cli.tiny import save_tiny, write_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(save_tiny("llama", tmp_path_factory.mktemp("model")))


def write_facts(path: Path, count: int = 30) -> Path:
    facts = [{"prompt": f"w{i} w3 {{}} w4", "targets": [f"w{i + 7} w{i + 8}"]} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, facts)) + "\n", encoding="utf-8")
    return path


def made(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, *knowledge: Path, tokens: int = 2048) -> Stage1Batches:
    general = write_text(tmp_path / "general.txt", documents=5)
    return stage1_batches(knowledge, [str(general)], tokenizer, window=32, tokens=tokens, seed=0, old_every=1)  # type: ignore[arg-type]


def test_only_the_objects_tokens_count(tokenizer: PreTrainedTokenizerBase) -> None:
    for prompt in ("w1 w2 {} w3", "w1 w2 {}", "w1 w2"):
        fact = fact_of(prompt, "w9 w8", tokenizer, 32)
        words = tokenizer.convert_ids_to_tokens(fact.ids)
        assert words[0] == "<s>" and [w for w, c in zip(words, fact.counted) if c] == ["w9", "w8"]


def test_text_and_facts_may_be_mixed_and_every_batch_has_general_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Defect 4 of the released code: the path of structured knowledge could not be reached."""
    text, facts = write_text(tmp_path / "text.txt"), write_facts(tmp_path / "facts.jsonl")
    both = made(tmp_path, tokenizer, text, facts)
    kinds = [bool(both[i]["structured"]) for i in range(len(both))]
    assert set(kinds) == {True, False} and kinds == sorted(kinds)
    objects = 0
    for i, structured in enumerate(kinds):
        batch = both[i]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["counted"].shape
        assert batch["input_ids"].numel() <= 32 and batch["general_ids"].shape == (1, 32)
        assert batch["general_mask"].all() and not batch["counted"][batch["attention_mask"] == 0].any()
        objects += int(batch["counted"].sum()) if structured else 0
    assert objects == 30 * 2
    assert len({both[i]["general_ids"].sum().item() for i in range(len(both))}) > 1
    alone = made(tmp_path, tokenizer, facts)
    assert all(bool(alone[i]["structured"]) for i in range(len(alone)))


def test_what_is_read_again_stands_beside_other_general_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    text, general = write_text(tmp_path / "text.txt", 2), write_text(tmp_path / "general.txt")
    of = stage1_batches([text], [str(general)], tokenizer, window=32, tokens=32 * 20, seed=0, old_every=4)
    assert of.distinct < 10 and len(of) == 20
    assert torch.equal(of[1]["input_ids"], of[1 + of.distinct]["input_ids"])
    assert [("general_ids" in of[i]) for i in range(8)] == [True, False, False, False] * 2
    assert float(of[0]["old_weight"]) == 4
    beside = [of[i]["general_ids"] for i in range(0, 20, 4)]
    assert len({tuple(ids.flatten().tolist()) for ids in beside}) == 5  # all of what was packed


def test_every_target_is_a_fact(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text(json.dumps({"prompt": "w1 {} .", "targets": ["w2", "w3 w4"]}), encoding="utf-8")
    batches = made(tmp_path, tokenizer, file)
    assert sum(int(batches[i]["counted"].sum()) for i in range(batches.distinct)) == 3


def test_the_seed_orders_the_knowledge(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Defect 4 once more: the seed only named the run."""
    text, general = write_text(tmp_path / "text.txt"), write_text(tmp_path / "general.txt")

    def ids(seed: int) -> torch.Tensor:
        of = stage1_batches([text], [str(general)], tokenizer, window=32, tokens=640, seed=seed, old_every=1)
        return torch.cat([torch.cat([of[i]["input_ids"], of[i]["general_ids"]], 1) for i in range(len(of))])

    assert torch.equal(ids(0), ids(0)) and not torch.equal(ids(0), ids(1))


def test_bad_facts_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(FactorMixError, match="more than a window of 8"):
        fact_of("w1 w2 w3 w4 w5 w6 w7 {}", "w8", tokenizer, 8)
    with pytest.raises(FactorMixError, match="too little text"):
        made(tmp_path, tokenizer, write_text(tmp_path / "short.txt", documents=1, words=5))
