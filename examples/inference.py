"""Batch inference without a task: take a batch of lines, generate, hand the results back.

The whole program is its loop, `work`: WorkClient hands out lines and takes results, and vLLM's
offline engine answers a batch in one call. Start as many of these as there are GPUs:

    dispatcher-server --infile prompts.jsonl --outfile answers.jsonl --work-timeout 3600
    python examples/inference.py --model_path MODEL \\
        --dispatcher_server @answers.jsonl.dispatch/server.json

A line comes back with its answers in `generations`. Choose `--work-timeout` of the server well
above the time that one batch takes, as this program reports nothing before a batch is finished.
A batch given back on a signal costs its lines nothing. When the engine refuses a batch, its
lines are asked one by one, so that the line at fault gets an `__ERROR__` and the others their
answers.

Exit codes: 0 all work is complete, 1 error, 2 usage, 3 stopped by a signal, 5 server lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from dispatcher.client import WorkClient
from dispatcher.errors import (
    AccessDeniedError,
    BadRequestError,
    ExitCode,
    ServerLostError,
    UsageError,
)
from dispatcher.models import (
    BatchResultResponse,
    BatchWorkResponse,
    ReleaseItem,
    WorkItem,
    WorkStatus,
)

PromptPath = list[str | int]
Prompt = str | list[dict[str, Any]]
Generate = Callable[[list[Prompt]], list[list[str]]]
Reply = TypeVar("Reply", BatchWorkResponse, BatchResultResponse)

WAIT_S = 2.0  # how long the server may hold a call for lines open; a stop waits for it
POLL_S = 1.0  # when the server says "retry" without saying when
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
SERVER_PATIENCE_S = 600.0  # a server that restarts on another node is back well before that

log = logging.getLogger("inference")


# --- the loop ------------------------------------------------------------------------------


def work(
    client: WorkClient, generate: Generate, options: argparse.Namespace, stop: Stop
) -> ExitCode:
    """Take lines, answer them, hand them back, until the server has no more; return exit code.

    On a signal, and when generating fails, the lines held are released for other workers.
    """
    held: list[WorkItem] = []
    try:
        while True:
            stop.check()
            reply = patiently(partial(client.get_work, options.batch_size, WAIT_S), stop)
            if reply.status == WorkStatus.ALL_WORK_COMPLETE:
                log.info("all work is complete")
                return ExitCode.COMPLETE
            if not reply.items:
                stop.sleep(reply.retry_in or POLL_S)
                continue
            held = reply.items
            with stop.may_break():
                answer(held, generate, options.prompt_path, options.mode)
            taken = patiently(partial(client.submit_results, held), stop)
            log.info("%d lines answered, the server took %d", len(held), taken.count)
            held = []
    except KeyboardInterrupt:
        log.info("stopped by a signal")
        release(client, held, charge=False)
        return ExitCode.STOPPED
    except (GenerationError, BadRequestError) as error:
        log.error("%s", error, exc_info=error.__cause__)
        # A signal to the whole process group also ends the engine's own processes.
        release(client, held, charge=not stop.asked)
        return ExitCode.STOPPED if stop.asked else ExitCode.ERROR
    except ServerLostError as error:
        log.error("%s", error)
        return ExitCode.SERVER_LOST


def answer(items: Sequence[WorkItem], generate: Generate, path: PromptPath, mode: str) -> None:
    """Set the result of every item, with one call of `generate` for all that hold a prompt.

    A line without a usable prompt gets an `__ERROR__` result and does not reach the engine.
    """
    asked: list[tuple[WorkItem, dict[str, Any]]] = []
    prompts: list[Prompt] = []
    for item in items:
        try:
            data = parse_line(item.content)
            prompts.append(find_prompt(data, path, mode))
        except LineError as problem:
            error = {"error": problem.kind, "message": str(problem), "work_id": item.work_id}
            item.set_result(json.dumps({"__ERROR__": error}, ensure_ascii=False))
        else:
            asked.append((item, data))
    if not prompts:
        return
    for (item, data), texts in zip(asked, generate_all(prompts, generate), strict=True):
        if isinstance(texts, GenerationError):
            error = {"error": "generation_failed", "message": str(texts), "work_id": item.work_id}
            item.set_result(json.dumps({"__ERROR__": error}, ensure_ascii=False))
        else:
            item.set_result(json.dumps({**data, "generations": texts}, ensure_ascii=False))


def generate_all(
    prompts: list[Prompt], generate: Generate
) -> Sequence[list[str] | GenerationError]:
    """Answer all prompts in one call; when that fails, one by one, to find the one at fault.

    Raises GenerationError when no prompt gets an answer: then it is the engine.
    """
    try:
        return generate(prompts)
    except Exception as error:  # noqa: BLE001 (the engine may raise anything)
        failure = _failure(error)
    if len(prompts) == 1:
        raise failure
    answers: list[list[str] | GenerationError] = []
    for prompt in prompts:
        try:
            answers += generate([prompt])
        except Exception as error:  # noqa: BLE001
            answers.append(_failure(error))
    if all(isinstance(answer, GenerationError) for answer in answers):
        raise failure
    return answers


def _failure(error: Exception) -> GenerationError:
    failure = GenerationError(f"generating failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def patiently(call: Callable[[], Reply], stop: Stop) -> Reply:
    """Repeat `call` while the server is away, with growing pauses; return the server's reply.

    Raises ServerLostError after SERVER_PATIENCE_S seconds of pauses.
    """
    waited_s, pause_s = 0.0, FIRST_PAUSE_S
    while (reply := call()).status == WorkStatus.SERVER_UNAVAILABLE:
        if waited_s >= SERVER_PATIENCE_S:
            raise ServerLostError(
                f"the dispatcher server has not answered for {waited_s:.0f} s; start this "
                "program again when the server is back, no finished line is lost"
            )
        log.warning("the dispatcher server does not answer; next try in %.0f s", pause_s)
        stop.sleep(pause_s)
        waited_s += pause_s
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    return reply


def release(client: WorkClient, items: Sequence[WorkItem], *, charge: bool) -> None:
    """Give unfinished lines back, so that another worker gets them now and not at a timeout.

    With `charge` each costs one of its retries, so that a line that breaks engines ends.
    """
    if not items:
        return
    why = "generating failed" if charge else "the worker was stopped"
    reply = client.release_work(
        items=[ReleaseItem(item.work_id, item.lease, charge, why) for item in items]
    )
    if reply.status == WorkStatus.OK:
        log.info("released %d lines", reply.released_count)
    else:
        log.warning("could not release %d lines; the server waits for them", len(items))


class GenerationError(Exception):
    """The engine raised instead of answering a batch."""


class Stop:
    """Turns SIGTERM and Ctrl-C into KeyboardInterrupt, but only where nothing gets lost by it.

    Generating and sleeping can be broken off at any moment. A call to the server must run to
    its end: lines handed out in a reply that nobody read could not be released.
    """

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        self.asked = False
        self._sleep = sleep
        self._breakable = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals for as long as the block runs."""
        signals = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self.on_signal) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def on_signal(self, number: int, frame: object) -> None:
        """Note that a stop is asked for; break off what can be broken off."""
        self.asked = True
        if self._breakable:
            self._breakable = False  # `timeout` and some launchers send the signal twice
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop has been asked for."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def may_break(self) -> Iterator[None]:
        """Let a signal break off this block, also one that came before the block."""
        self._breakable = True
        try:
            self.check()
            yield
        finally:
            self._breakable = False

    def sleep(self, seconds: float) -> None:
        """Sleep, unless and until a stop is asked for."""
        with self.may_break():
            self._sleep(seconds)


# --- from a line to a prompt ---------------------------------------------------------------


class LineError(Exception):
    """A line has no usable prompt; `kind` is the one word that its `__ERROR__` result shows."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parse_line(line: str) -> dict[str, Any]:
    """Return the JSON object that the line holds; raise LineError `not_json` if it holds none.

    What cannot be written back as JSON in UTF-8 (NaN, half an emoji) counts as no JSON.
    """
    try:
        data = json.loads(line)
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise LineError("not_json", f"the line is not valid JSON: {_printable(error)}") from error
    if not isinstance(data, dict):
        raise LineError("not_json", f"the line is {_kind(data)}, not an object")
    return data


def parse_path(text: str) -> PromptPath:
    """Parse a jq-like path: `.messages[0].content` becomes `["messages", 0, "content"]`.

    `.key` goes into an object, `[2]` into a list, `[-1]` is its last element, `.` is the line.
    Raises ValueError that says where the path cannot be read.
    """
    if text == ".":
        return []
    steps: PromptPath = []
    position = 0
    while position < len(text):
        step = re.compile(r"\.([^.\[\]]+)|\.?\[(-?\d+)\]").match(text, position)
        if step is None:
            raise ValueError(
                f"cannot read {text!r} from {text[position:]!r} on; "
                "a path looks like .messages[0].content"
            )
        steps.append(step[1] if step[1] is not None else int(step[2]))
        position = step.end()
    if not steps:
        raise ValueError("the path is empty; a path looks like .messages[0].content")
    return steps


def follow_path(data: Any, path: PromptPath) -> Any:
    """Return what stands at the path; raise LineError `no_prompt` naming the step that failed."""
    value, seen = data, ""
    for step in path:
        here = f"at {seen or '.'} the line has {_kind(value)}"
        if isinstance(step, str):
            if not isinstance(value, dict):
                raise LineError("no_prompt", f"{here}, so it has no key {step!r}")
            if step not in value:
                raise LineError("no_prompt", f"{here} without the key {step!r}")
            seen += f".{step}"
        else:
            if not isinstance(value, list):
                raise LineError("no_prompt", f"{here}, so it has no element [{step}]")
            if not -len(value) <= step < len(value):
                raise LineError("no_prompt", f"{here} of {len(value)}, without element [{step}]")
            seen += f"[{step}]"
        value = value[step]
    return value


def find_prompt(data: dict[str, Any], path: PromptPath, mode: str) -> Prompt:
    """Return the line's prompt: messages in chat mode, a string in completion mode.

    In chat mode a list is taken as messages and a string becomes one user message.
    """
    found = follow_path(data, path)
    if isinstance(found, str):
        return [{"role": "user", "content": found}] if mode == "chat" else found
    if mode == "completion":
        raise LineError("no_prompt", f"the prompt is {_kind(found)}; a completion needs a string")
    if not isinstance(found, list):
        raise LineError(
            "no_prompt", f"the prompt is {_kind(found)}; a chat needs a string or a list"
        )
    # One malformed message would make the engine refuse the whole batch.
    if not found or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in found):
        raise LineError("no_prompt", "the prompt is not a list of messages that each have a role")
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _printable(error: Exception) -> str:
    return str(error).encode("utf-8", "backslashreplace").decode()


# --- the engine ----------------------------------------------------------------------------


def load_engine(options: argparse.Namespace) -> Generate:
    """Load the model with vLLM; return the function that answers a list of prompts."""
    try:
        from vllm import LLM, SamplingParams
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        sys.exit("vLLM is not installed here: run this in a vLLM container, or pip install vllm.")

    sampling = SamplingParams(
        n=options.num_generations,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        min_p=options.min_p,
        stop=options.stop_word or None,
    )
    llm = LLM(
        model=options.model_path,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=options.max_model_len,
    )
    ask = llm.chat if options.mode == "chat" else llm.generate

    def generate(prompts: list[Prompt]) -> list[list[str]]:
        requests = ask(prompts, sampling, use_tqdm=False)
        return [[choice.text for choice in request.outputs] for request in requests]

    return generate


# --- the command line ----------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; every default stands in its help."""
    parser = argparse.ArgumentParser(
        description="Answer a dispatcher server's lines with vLLM, a batch at a time."
    )
    add = parser.add_argument
    add("--model_path", required=True, help="model directory or name that vLLM loads")
    add(
        "--dispatcher_server",
        required=True,
        metavar="ADDRESS",
        help="the dispatcher server: @STATE/server.json, or HOST:PORT or a URL with the token in "
        "the variable DISPATCHER_TOKEN and the fingerprint of its certificate, if it speaks TLS, "
        "in DISPATCHER_FINGERPRINT",
    )
    add(
        "--batch_size",
        type=_positive,
        default=64,
        metavar="N",
        help="lines to take and to answer at a time (default: %(default)s)",
    )
    add(
        "--prompt_path",
        type=_path,
        default=".messages[0].content",
        metavar="PATH",
        help="where a line holds its prompt; .messages takes a whole chat (default: %(default)s)",
    )
    add(
        "--mode",
        choices=("chat", "completion"),
        default="chat",
        help="apply the model's chat template, or continue the bare text (default: %(default)s)",
    )
    add(
        "--stop_word",
        action="append",
        default=[],
        metavar="TEXT",
        help="end an answer before this text; may be given several times (default: none)",
    )
    add(
        "--num_generations",
        type=_positive,
        default=1,
        metavar="N",
        help="answers to each prompt (default: %(default)s)",
    )
    add(
        "--max_model_len",
        type=_positive,
        metavar="TOKENS",
        help="longest prompt and answer together (default: what the model allows)",
    )
    add(
        "--max_tokens",
        type=_positive,
        default=1024,
        metavar="TOKENS",
        help="longest answer (default: %(default)s)",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="0 always takes the likeliest token (default: %(default)s)",
    )
    add(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that add up to P (default: %(default)s)",
    )
    add(
        "--min_p",
        type=float,
        default=0.0,
        metavar="P",
        help="skip tokens less likely than P times the likeliest one (default: %(default)s)",
    )
    add(
        "--tensor_parallel_size",
        type=_positive,
        default=1,
        metavar="N",
        help="GPUs to spread the model over (default: %(default)s)",
    )
    return parser


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what cannot be right ends the program with code 2."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.temperature < 0:
        parser.error("--temperature must be 0 or more")
    if not 0 < options.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")
    if not 0 <= options.min_p <= 1:
        parser.error("--min_p must be between 0 and 1")
    if options.temperature == 0 and options.num_generations > 1:
        parser.error("--num_generations above 1 needs --temperature above 0")
    return options


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def _path(text: str) -> PromptPath:
    try:
        return parse_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(
    argv: Sequence[str] | None = None,
    connect: Callable[[str, str], WorkClient] = WorkClient,
    load: Callable[[argparse.Namespace], Generate] = load_engine,
) -> int:
    """Run the program; return its exit code."""
    options = parse_options(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        # A name lets the server wait, at the end, until this worker has heard of it.
        worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        client = connect(options.dispatcher_server, worker)
    except UsageError as error:
        log.error("%s", error)
        return error.exit_code
    stop = Stop()
    with stop.listening():
        # The model comes first: lines taken before it is loaded would only wait.
        try:
            with stop.may_break():
                generate = load(options)
        except KeyboardInterrupt:
            return ExitCode.STOPPED
        try:
            return work(client, generate, options, stop)
        except (AccessDeniedError, UsageError) as error:  # not this run's token, or no good file
            log.error("%s", error)
            return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
