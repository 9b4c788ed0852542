"""Write a tokenizer into a GGUF file: byte-level BPE that splits text in a way which llama.cpp knows by name."""

from __future__ import annotations

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from factormix.data.packing import around
from factormix.run.errors import FactorMixError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # the regular expression of a Split before ByteLevel -> llama.cpp's name
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Write the tokens, merges, special tokens and chat template of `tokenizer`.

    Raises:
        FactorMixError: it is not byte-level BPE, or llama.cpp has no name for its way of splitting text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {}
    model = spec.get("model", {})
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(spec, type(tokenizer).__name__))
    tokens = {index: token for token, index in model["vocab"].items()}
    added = {token["id"]: token for token in spec["added_tokens"]}
    tokens |= {index: token["content"] for index, token in added.items()}
    ids = range(max(vocabulary, max(tokens) + 1))
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([_kind(i, tokens, added) for i in ids])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer.bos_token_id in around(tokenizer, None)[0])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def split_name(spec: dict[str, Any], kind: str) -> str:
    """llama.cpp's name for the way in which a tokenizer.json splits text.

    Raises:
        FactorMixError: llama.cpp has no name for it.
    """
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if spec.get("model", {}).get("type") == "BPE" and kinds and kinds[-1] == "ByteLevel":
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
            return name
    raise FactorMixError(
        f"no GGUF, because this {kind} splits text in a way that is not supported; allowed: those of GPT-2, SmolLM, "
        "Llama-3, Qwen2. Export another container and convert it with llama.cpp's convert_hf_to_gguf.py."
    )


def _kind(index: int, tokens: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if index not in tokens:
        return int(gguf.TokenType.UNUSED)
    if index in added:
        return int(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
    return int(gguf.TokenType.NORMAL)
