"""A tokenizer and a checkpoint, small and made here: bytes and some merges, and a llama of one layer."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 384
TEMPLATE = (
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, 120 merges, and an end of text; every text can be encoded and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    corpus = ["the quick brown fox jumps over the lazy dog", "one two three four five six seven eight nine ten"] * 4
    tokenizer.train_from_iterator(corpus, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)
    made.chat_template = TEMPLATE
    return made


@cache
def tiny_model() -> LlamaForCausalLM:
    """Random weights, one layer, greedy texts that vary."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=tiny_tokenizer().eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(3)
    return LlamaForCausalLM(config).eval()


def save_checkpoint(where: Path) -> Path:
    """The two as a checkpoint's directory."""
    tiny_model().save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where
