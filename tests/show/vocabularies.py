"""Tokenizers of the three kinds that pieces of text come from, each as small as it can be."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.families import VOCAB


def of_bytes() -> PreTrainedTokenizerFast:
    """One token a byte, as GPT-2's alphabet writes them: a letter beyond ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def of_words(special: bool = True) -> PreTrainedTokenizerFast:
    """Lower-case words w0, w1, ... and their pieces ##0, ..., [CLS] and [SEP] around them: BERT's way."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", ",", *(f"##{digit}" for digit in "0123456789")]
    names += [f"w{i}" for i in range(VOCAB - len(names))]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if special:
        around = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


class WithoutOffsets:
    """A slow tokenizer: the one inside, without offsets."""

    is_fast = False

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def __call__(self, text: str, return_offsets_mapping: bool = False, **options: object) -> object:
        assert not return_offsets_mapping, "a slow tokenizer raises NotImplementedError"
        return self._inner(text, **options)
