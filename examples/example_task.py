"""Two tasks of more than one step: compare two answers; ask again until an answer is valid.

Both read lines like those of `data/prompts.jsonl`, and run like `chat_task.py`:

    dispatcher run --task examples/example_task.py:CompareTwoResponsesTask \\
        --input examples/data/prompts.jsonl --output compared.jsonl
"""

import re
from collections.abc import Generator
from typing import Any

from dispatcher.taskmanager.backend.request import Request, Response
from dispatcher.taskmanager.task import GeneratorTask, TaskFailed, TaskRetry

JUDGE_PROMPT = """\
Two assistants answered the same message. Which answer is better?

Message:
{prompt}

Answer A:
{a}

Answer B:
{b}

Reply with one letter, A or B, and nothing else."""


class CompareTwoResponsesTask(GeneratorTask):
    """Asks for two answers at once, then lets the model judge which of them is better.

    Adds `response_a`, `response_b`, `verdict` (A or B) and `chosen` (the better answer) to the
    line. A verdict that is neither A nor B makes it an `__ERROR__` line, `unclear_verdict`.
    """

    def task_generator(self) -> Generator[Request | list[Request], Any, dict[str, Any]]:
        """Yield a list (both answers are generated in parallel), then the judge's request."""
        question = {
            "messages": self.data["messages"],
            "max_tokens": self.args.get("max_tokens", 64),
        }
        # The seeds differ so that the answers do; they are fixed so that a run can be repeated.
        response_a, response_b = yield [
            Request({**question, "temperature": 0.3, "seed": 1}),
            Request({**question, "temperature": 1.0, "seed": 2}),
        ]
        answers = {"A": text_of(response_a), "B": text_of(response_b)}

        prompt = JUDGE_PROMPT.format(
            prompt=last_user_message(self.data["messages"]), a=answers["A"], b=answers["B"]
        )
        judgement = yield Request(
            {"messages": [{"role": "user", "content": prompt}], "max_tokens": 8, "temperature": 0}
        )
        verdict = read_verdict(text_of(judgement))
        return {
            **self.data,
            "response_a": answers["A"],
            "response_b": answers["B"],
            "verdict": verdict,
            "chosen": answers[verdict],
        }


class ValidatedResponseTask(GeneratorTask):
    """Asks for an answer and checks it; an answer that is not valid has the line tried again.

    The line is written with `response` and `task_metadata`, which says whether the check was
    passed. After the last retry an answer that is still not valid is kept for inspection, with
    `success` false and the reason in `error`.
    """

    def task_generator(self) -> Generator[Request, Response, dict[str, Any]]:
        """Ask once; return, retry, or give up with what there is."""
        messages = self.data["messages"]
        response = yield Request(
            {
                "messages": messages,
                "max_tokens": self.args.get("max_tokens", 64),
                # Sampled: at temperature 0 every retry would get the same answer.
                "temperature": self.args.get("temperature", 0.8),
            }
        )
        text = text_of(response)
        problem = find_problem(
            text, last_user_message(messages), max_words=self.args.get("max_words", 300)
        )
        if problem is None:
            return self.build_result(response=text)
        if self.is_last_retry_attempt():
            return self.build_result(
                success=False, error=problem, error_type="validation_failed", response=text
            )
        raise TaskRetry(problem)


def text_of(response: Response) -> str:
    """Return the answer's text, "" if it has none; raise TaskFailed if the request failed."""
    if not response.is_success:
        raise TaskFailed(str(response.error), "model_error")
    text: str | None = response.get_text()
    return text or ""


def last_user_message(messages: list[dict[str, str]]) -> str:
    """Return what the user said last, "" if the user said nothing."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def read_verdict(text: str) -> str:
    """Return "A" or "B"; raise TaskFailed when the judge said neither.

    Only a letter on its own counts, or after "Answer" or "The better answer is", because the A
    in "A good answer would be ..." is not a verdict.
    """
    introduction = r"(?:(?:the\s+)?(?:better\s+)?answer(?:\s+is)?\W+)?"
    found = re.fullmatch(rf"\W*{introduction}([AB])\W*", text, re.IGNORECASE)
    if found is None:
        raise TaskFailed(f"the judge said {text!r} instead of A or B", "unclear_verdict")
    return found[1].upper()


def find_problem(text: str, prompt: str, max_words: int) -> str | None:
    """Return why `text` is no valid answer to `prompt`, None when it is valid."""
    words = text.split()
    if len(words) < 2:
        return f"the answer has {len(words)} word(s); at least 2 are expected"
    if len(words) > max_words:
        return f"the answer has {len(words)} words; at most {max_words} are allowed"
    if [word.casefold() for word in words] == [word.casefold() for word in prompt.split()]:
        return "the answer repeats the prompt"
    return None
