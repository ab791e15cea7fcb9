"""Small byte-level BPE tokenizers, trained in a moment on the text they should know as whole words."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TINY = Path(__file__).parent / "data" / "tiny_gpt2_3L"

SENTENCES = (
    "When Michael and Jessica went to the bar, Michael Ashley Joshua David Sarah gave a drink to "
    "City: Barcelona\nCountry: Spain City: Beijing\nCountry: China an Mary John"
)


def bpe(text=SENTENCES, *, adds_bos=False, digits=None, chat_template=None, **special):
    """A tokenizer that knows every word of text as one token, alone or after a space; others fall into letters.

    It has a BOS, "<|endoftext|>" as GPT-2's, which it adds only if adds_bos. digits: how many stand in a token.
    """
    words = [f" {word}" for word in text.split()] * 3
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = [pre_tokenizers.Split(Regex(rf"\d{{{digits}}}"), "isolated")] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*apart, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text, text, *words], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | special
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = chat_template
    return wrapped


def word_level():
    """The tiny models' tokenizer: whole words, spaces around punctuation, unknown words read as padding."""
    return AutoTokenizer.from_pretrained(TINY)
