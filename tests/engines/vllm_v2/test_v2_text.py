"""Stop strings: reuse equals stock vLLM with those, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from v2_samples import VOCAB, assert_same, drafted, generate, params, random_prompts, wrong_at

pytestmark = pytest.mark.v2_large

PROMPT = random_prompts([9], seed=3)[0]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One letter a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(ord("0") + i) for i in range(VOCAB)]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, letters[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("letters")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def args(tokenizer_dir: Path) -> dict[str, Any]:
    return {"skip_tokenizer_init": False, "tokenizer": str(tokenizer_dir)}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_stop_strings(make_llm: Any, args: dict[str, Any], is_async: bool) -> None:
    plain, llm = make_llm(**args), make_llm(8, async_scheduling=is_async, **args)
    whole = params(61, max_tokens=16)
    whole.detokenize = True
    (output,) = plain.generate([{"prompt_token_ids": PROMPT}], [whole], use_tqdm=False)
    text, tokens = output.outputs[0].text, list(output.outputs[0].token_ids)
    assert len(text) == 16
    for stop in (text[4:6], text[9], text[2:5]):
        sampling = whole.clone()
        sampling.stop = [stop]
        sampling.output_text_buffer_length = len(stop) - 1
        expected = generate(plain, [PROMPT], [sampling])
        assert expected.reasons == ["stop"]
        for draft in (tokens, wrong_at(tokens, 3)):
            assert_same(generate(llm, [PROMPT], [drafted(sampling, draft)]), expected)
