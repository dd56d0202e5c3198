"""Make a tiny Llama chat model on the spot, for tests against a real vLLM.

Run it with the Python of an environment that has torch, transformers and tokenizers,
which any vLLM environment is (``scripts/install_vllm_cpu.sh`` makes one)::

    python tests/support/tiny_model.py DIR

It takes a few seconds and no network. ``DIR`` is created if need be and then holds all that
``vllm serve DIR`` needs: configuration, weights, tokenizer and chat template.

The weights are random, so the answers are gibberish, but they are the same gibberish every
time: the seed is fixed and so is the text that the tokenizer is trained on. What a test may
rely on is that the model takes any UTF-8 prompt that is not empty and not above
``MAX_POSITIONS`` tokens, and that chat, completion, logprobs, seeds and token counts
behave as with a model of full size.
An answer seldom ends before ``max_tokens``, because the end token is one among several
hundred that are all about equally likely.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20240607
VOCABULARY = 768
"""Upper limit: 256 bytes, the special tokens, and what merges ``TEXT`` yields."""
HIDDEN = 128
LAYERS = 2
HEADS = 4
KEY_VALUE_HEADS = 2
INTERMEDIATE = 352
MAX_POSITIONS = 2048

START = "<|start|>"
END = "<|end|>"
PAD = "<|pad|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] }}:\n{{ message['content'] }}" + END + "\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)

TEXT = """\
A dispatcher stands at the harbour and hands out crates to whoever has a free pair of hands.
Each crate has a number, and each number is written down in the book before the crate leaves.
When a carrier comes back, the dispatcher looks at the number and strikes it from the list.
Some carriers never come back. Their crates are counted again and given to somebody else.
Nobody knows in the morning how many carriers there will be in the evening.
The wind turns, a ship calls for every man it can get, and half of the carriers are gone.
The work must go on all the same, and no crate may be lost, and none may be delivered twice.
What is the capital of Finland? The capital of Finland is Helsinki.
What is the capital of France? The capital of France is Paris.
What is the largest planet? The largest planet is Jupiter, and the smallest is Mercury.
How many days are there in a week? There are seven days in a week and twelve months in a year.
Write a short story about a lighthouse. Once upon a time there was a lighthouse by the sea.
The keeper of the lighthouse lit the lamp every evening and put it out every morning.
One night a storm came up from the south, and the waves were higher than the house.
The keeper climbed the stairs, step by step, and kept the light burning until the day broke.
Translate the following sentence into another language, and explain every word of it.
Summarise the text below in one sentence. Answer with a number between one and ten.
Is the following statement true or false? Give a reason for your answer, then the answer.
You are a helpful assistant. The user asks a question, and the assistant answers the question.
The system reads a line, sends a request, waits for the response and writes the result.
A request that fails is tried again after a while, and the while gets longer every time.
If the server is busy, the client waits. If the server is gone, the client looks for another.
Numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 40 50 60 70 80 90 100 1000 10000.
{"id": 1, "text": "the first line", "score": 0.5, "tags": ["one", "two", "three"]}
{"id": 2, "text": "the second line", "score": 1.5, "tags": [], "next": null, "done": true}
def add(first, second):
    return first + second
for line in lines:
    print(line.strip())
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``TEXT``; it can encode any UTF-8 text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama with random weights, the same ones every time, for ``tokenizer``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def make_directory(directory: Path) -> int:
    """Write model and tokenizer to ``directory``; return the number of parameters."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return int(model.num_parameters())


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model directory named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Make a tiny Llama chat model for tests.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the model goes")
    options = parser.parse_args(arguments)
    # Nothing is fetched; this makes sure of it. It must precede the first import.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parameters = make_directory(options.directory)
    print(f"{options.directory}: {parameters} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
