"""Stage-2 directories: what is refused, and that nothing else than what was saved is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from factormix import FactorMixError
from factormix.mix.load import load_mix, read_task, save_mix
from factormix.mix.mix_model import MixModel
from factormix.mix.peft_tuner import trainable_names
from factormix.mix.task import Task
from tests.families import tiny_model
from tests.mix.adapted import saved
from tests.mix.toy import disturb, domains, mix, padded

TASK = Task("single-label", ("a", "b", "c"), pooling="last")
ROWS = [[5, 6, 7], [8, 9]]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, Path], MixModel]:
    folders = domains("llama", tmp_path / "adapters")
    model = mix(tiny_model("llama"), folders)
    disturb(model)
    save_mix(model, TASK, folders, tmp_path / "out")
    return tmp_path / "out", folders, model


def test_the_directory_is_the_contracts(made: tuple[Path, dict[str, Path], MixModel]) -> None:
    out, folders, _ = made
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert files == [
        "gate/gate.json", "gate/gate.safetensors", "head.safetensors", "task.json",
        "task_adapter/task_adapter.json", "task_adapter/task_adapter.safetensors",
    ]  # fmt: skip
    assert len({p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()}) == 1
    values = json.loads((out / "task.json").read_text())
    assert [d["name"] for d in values["domains"]] == list(folders)
    assert [d["path"] for d in values["domains"]] == ["../adapters/pubmed", "../adapters/reviews"]
    assert values["task"]["labels"] == ["a", "b", "c"] and values["task"]["metric"] == "accuracy"
    gate = json.loads((out / "gate" / "gate.json").read_text())
    assert [d["name"] for d in gate["domains"]] == list(folders) and len(gate["domains"][0]["sha256"]) == 64


@pytest.mark.parametrize("trainable", [False, True])
def test_loads_where_the_folders_moved_together(
    made: tuple[Path, dict[str, Path], MixModel], tmp_path: Path, trainable: bool
) -> None:
    out, _, model = made
    (tmp_path / "moved").mkdir()
    shutil.move(out, tmp_path / "moved" / "out")
    shutil.move(tmp_path / "adapters", tmp_path / "moved" / "adapters")
    again, task = load_mix(tmp_path / "moved" / "out", tiny_model("llama"), trainable=trainable)
    assert task == TASK and trainable_names(again) == (set(again.trained) if trainable else set())
    assert torch.equal(again(*padded(ROWS)), model(*padded(ROWS)))


def test_another_order_is_refused_naming_both(made: tuple[Path, dict[str, Path], MixModel]) -> None:
    out, folders, _ = made
    turned = dict(reversed(folders.items()))
    with pytest.raises(
        FactorMixError, match=r"weighs the domains pubmed, reviews, in this order; received reviews, pubmed"
    ):
        load_mix(out, tiny_model("llama"), turned)
    with pytest.raises(FactorMixError, match=r"pubmed, reviews, in this order; received pubmed\."):
        load_mix(out, tiny_model("llama"), {"pubmed": folders["pubmed"]})


def test_another_adapter_of_the_same_name_is_refused_naming_both(
    made: tuple[Path, dict[str, Path], MixModel], tmp_path: Path
) -> None:
    out, folders, _ = made
    other = saved(tmp_path / "others", tiny_model("llama"), "reviews", seed=9)
    hashes = [d["sha256"] for d in json.loads((out / "gate" / "gate.json").read_text())["domains"]]
    with pytest.raises(FactorMixError, match=f"'reviews' whose weights have SHA-256 {hashes[1]}; .*others/reviews"):
        load_mix(out, tiny_model("llama"), {**folders, "reviews": other})
    shutil.copytree(other, folders["reviews"], dirs_exist_ok=True)
    with pytest.raises(FactorMixError, match="adapt again"):
        load_mix(out, tiny_model("llama"))


def test_a_missing_domain_is_named(made: tuple[Path, dict[str, Path], MixModel]) -> None:
    out, folders, _ = made
    shutil.rmtree(folders["reviews"])
    with pytest.raises(FactorMixError, match="domain 'reviews' of .* should be at"):
        load_mix(out, tiny_model("llama"))


@pytest.mark.parametrize("name", ["gate/gate.safetensors", "head.safetensors", "task_adapter/task_adapter.safetensors"])
def test_altered_missing_and_damaged_files_are_named(made: tuple[Path, dict[str, Path], MixModel], name: str) -> None:
    out, _, _ = made
    file = out / name
    data = file.read_bytes()
    file.write_bytes(data[:-4])
    with pytest.raises(FactorMixError, match=f"{Path(name).name}' was altered or truncated"):
        load_mix(out, tiny_model("llama"))
    file.unlink()
    with pytest.raises(FactorMixError, match=f"{Path(name).name}' is missing"):
        load_mix(out, tiny_model("llama"))


def test_task_json(made: tuple[Path, dict[str, Path], MixModel], tmp_path: Path) -> None:
    out, _, _ = made
    values = json.loads((out / "task.json").read_text())
    (out / "task.json").write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(FactorMixError, match="format_version 2; this FactorMix reads 1"):
        read_task(out)
    (out / "task.json").write_text("{")
    with pytest.raises(FactorMixError, match="damaged"):
        read_task(out)
    with pytest.raises(FactorMixError, match="has no task.json"):
        read_task(tmp_path)


def test_another_base_is_refused(made: tuple[Path, dict[str, Path], MixModel]) -> None:
    with pytest.raises(FactorMixError, match="made for another model"):
        load_mix(made[0], tiny_model("bert"))


def test_an_existing_directory_is_kept(made: tuple[Path, dict[str, Path], MixModel]) -> None:
    out, folders, model = made
    before = (out / "task.json").read_bytes()
    with pytest.raises(FactorMixError, match="--overwrite"):
        save_mix(model, TASK, folders, out)
    assert (out / "task.json").read_bytes() == before
    save_mix(model, TASK, folders, out, overwrite=True)
