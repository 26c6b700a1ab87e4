"""A tokenizer with a token per byte, for tests that need what the demo's does not have: special
tokens in the text, tokens put around a text, a chat template."""

from __future__ import annotations

from typing import Any

# Ids of the special tokens come after the 256 bytes, in this order.
SPECIALS = ("<pad>", "<bos>", "<eos>", "<think>", "</think>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS, THINK, END_THINK, IM_START, IM_END = range(256, 256 + len(SPECIALS))
VOCAB_SIZE = 256 + len(SPECIALS)

# As ChatML has it, with tools and a variable.
CHATML = (
    "{%- if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif -%}"
    "{% endif -%}"
)


def byte_tokenizer(chat_template: str | None = None, around: str | None = None) -> Any:
    """The tokenizer.

    Args:
        chat_template: Its chat template.
        around: What a text is put into, "<bos> $A <eos>" say.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    if around is not None:
        used = [(text, 256 + i) for i, text in enumerate(SPECIALS) if text in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    return fast
