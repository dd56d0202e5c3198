"""Every command that README, docs/ and --help show works as printed."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.make_reference import parsers
from tests.docs.blocks import Block, commands_of, help_blocks, shown_blocks
from tests.docs.stage import ELSEWHERE, REPLACED, Stage, make_stage
from tests.slurm.cluster import Cluster
from tests.support.processes import ROOT, running, wait_until

SHOWN = [*shown_blocks(), *help_blocks(parsers())]
# Asks the model hub; tests talk to this machine only.
NOT_HERE = "huggingface-cli download"
# The real vLLM, which tests/test_vllm.py types, with an environment for a small machine.
REAL_VLLM = ".venv-vllm/bin/python"
# Serves until it is stopped.
FAKELLM = "python -m dispatcher.fakellm "

OPTIONS = "--infile prompts.jsonl --outfile answers.jsonl --task my_tasks.py:MyTask --model a/model"


def is_for_slurm(block: Block) -> bool:
    return "sbatch " in block.text or "dispatcher slurm " in block.text


def is_run_here(block: Block) -> bool:
    """Say whether a block has a command that nothing else runs."""
    others = (*ELSEWHERE, "export ")
    commands = [each for each in commands_of(block.text) if not each.startswith(others)]
    is_elsewhere = any(text in block.text for text in (NOT_HERE, REAL_VLLM))
    return bool(commands) and not is_elsewhere and not commands[0].startswith(FAKELLM)


def params(blocks: list[Block]) -> list[object]:
    """Return blocks as parameters of a test, each once."""
    once = {tuple(commands_of(block.text)): block for block in blocks if is_run_here(block)}
    return [pytest.param(block, id=block.name) for block in once.values()]


@pytest.fixture(scope="module")
def cerebras_url() -> Iterator[str]:
    """Play the hosted endpoint."""
    with running(sys.executable, "-m", "dispatcher.fakellm", "--port", "0") as fake:
        yield fake.wait_for_line(re.compile(r"fakellm ready at (\S+)"))[1]


@pytest.fixture
def stage(tmp_path: Path, cerebras_url: str) -> Stage:
    """Return a directory as a user has it."""
    return make_stage(tmp_path, cerebras_url, {"PATH": os.environ["PATH"]})


@pytest.fixture
def cluster_stage(tmp_path: Path, cerebras_url: str, cluster: Cluster) -> Stage:
    """Return such a directory on a cluster."""
    return make_stage(tmp_path, cerebras_url, cluster.env)


def test_pages_and_helps_show_commands() -> None:
    pages = {block.page for block in SHOWN}
    assert {"README.md", "slurm/README.md", "dispatcher run --help"} <= pages
    assert sum(is_run_here(block) for block in SHOWN) > 25


@pytest.mark.parametrize(("command", "where"), ELSEWHERE.items())
def test_what_is_not_run_here_is_run_where_it_is_said(command: str, where: str) -> None:
    runs = " ".join((ROOT / where).read_text().replace("\\\n", " ").split())
    assert command.removeprefix("bash ") in runs


def test_the_block_with_the_real_vllm_is_typed_by_its_tests() -> None:
    (block,) = [block for block in SHOWN if REAL_VLLM in block.text]
    assert block.page == "README.md"
    typed = (ROOT / "tests" / "test_vllm.py").read_text()
    assert 'readme.partition("**Real vLLM without a GPU**")' in typed


def test_everything_that_is_replaced_is_shown_somewhere() -> None:
    shown = [" ".join(commands_of(block.text)) for block in SHOWN]
    text = re.sub(r"\s+", " ", "\n".join(shown))
    assert [each for each in REPLACED if each not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize("block", params([b for b in SHOWN if not is_for_slurm(b)]))
def test_a_shown_command_works(block: Block, stage: Stage) -> None:
    said = stage.type(block.text)

    assert "Traceback" not in said
    if (stage.directory / "answers.jsonl").exists() and "answers2" not in block.text:
        answers = stage.answers()
        assert [answer.get("id") for answer in answers] == list(range(len(answers)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in SHOWN if b.text.startswith(FAKELLM)], ids=lambda b: b.text
)
def test_a_shown_model_server_answers(block: Block, stage: Stage) -> None:
    (stage.directory / "faults.yaml").write_text("- {share: 0.1, first: 1, status: 500}\n")
    options = re.sub(r"--port \d+ ?", "", block.text.removeprefix(FAKELLM)).split()
    command = (sys.executable, "-m", "dispatcher.fakellm", "--port", "0")
    with stage.process(*command, *options) as fake:
        fake.wait_for_line(re.compile("fakellm ready"))


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.parametrize("block", params([b for b in SHOWN if is_for_slurm(b)]))
def test_a_shown_command_works_on_a_cluster(
    block: Block, cluster_stage: Stage, cluster: Cluster
) -> None:
    stage = cluster_stage
    if not re.search(r"\.sbatch|--infile|--config", block.text):
        kind = "run" if " slurm run " in block.text else "start"
        stage.type(f"dispatcher slurm {kind} {OPTIONS}")
        if "--resume" in block.text:
            stage.type("dispatcher slurm stop answers.jsonl")
    said = stage.type(block.text)

    assert "Traceback" not in said
    if "remove-workers" in block.page:
        stage.type("dispatcher slurm stop answers.jsonl")
    wait_until(lambda: not cluster.run("squeue", "--noheader"), "all jobs to end", 200)
