"""Two models in one run: a generator on this machine's GPU, and a hosted judge of its answers.

    export CEREBRAS_API_KEY=...
    dispatcher run --task examples/generator_and_judge.py:GenerateAndJudgeTask \\
        --input examples/data/prompts.jsonl --output judged.jsonl \\
        --config examples/generator_and_judge.yaml

The file names both model servers; `"model"` in a request picks one by that name. Each has limits
of its own, so that a judge that refuses requests never leaves the GPU idle.
"""

import re
from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed

JUDGE_PROMPT = """Rate the answer to the question from 1 (useless) to 5 (excellent).

Question:
{question}

Answer:
{answer}

Reply with one digit from 1 to 5, and nothing else."""


class GenerateAndJudgeTask(GeneratorTask):
    """Asks the generator, then the judge; adds `response` and `score` (1 to 5) to the line.

    A judgement without a score makes the line an `__ERROR__` line, `no_score`.
    """

    def task_generator(self) -> Generator[Request, Response, dict[str, Any]]:
        """Yield the request to the generator, then the one to the judge."""
        answer = text_of((yield Request({"messages": self.data["messages"], "model": "generator"})))
        prompt = JUDGE_PROMPT.format(question=self.data["messages"][-1]["content"], answer=answer)
        judgement = text_of(
            (yield Request({"messages": [{"role": "user", "content": prompt}], "model": "judge"}))
        )
        found = re.search(r"\b[1-5]\b", judgement)
        if found is None:
            raise TaskFailed(f"the judge said {judgement!r} instead of a digit", "no_score")
        return {**self.data, "response": answer, "score": int(found[0])}


def text_of(response: Response) -> str:
    """Return the answer's text, "" if it has none; raise TaskFailed if the request failed."""
    if not response.is_success:
        raise TaskFailed(str(response.error), "model_error")
    text: str | None = response.get_text()
    return text or ""
