"""Inputs of every real kind, read while they are copied and killed: no line is another one."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatcher.config import RunSettings
from dispatcher.models import ResultItem
from dispatcher.service import DispatchService
from dispatcher.storage.files import Files
from dispatcher.storage.inputs import growing
from dispatcher.storage.run_state import load_run_file
from tests.service.support import completed, output, run, serving
from tests.support.kinds import save_data_set, write_gzip, write_parquet, write_zstd

ROWS = [
    {"id": number, "text": random.Random(number).randbytes(1500).hex()} for number in range(900)
]
TEXT = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
"""Of nearly 3 MiB, which is several blocks of a reader."""


def parquet(directory: Path) -> Path:
    return write_parquet(directory / "in.parquet", ROWS)


def data_set(directory: Path) -> Path:
    return save_data_set(directory / "set", train=ROWS)


def files_of_a_data_set(directory: Path) -> Path:
    (files := directory / "files").mkdir()
    (files / "train.jsonl").write_bytes(TEXT)
    return Path(f"hf:{files}")


KINDS: list[Callable[[Path], Path]] = [
    lambda directory: write_gzip(directory, TEXT),
    lambda directory: write_zstd(directory, TEXT),
    parquet,
    data_set,
    files_of_a_data_set,
]


@pytest.mark.parametrize("make", KINDS, ids=["gzip", "zstd", "parquet", "saved", "files"])
def test_a_run_that_is_killed_again_and_again_answers_each_line_by_itself(
    make: Callable[[Path], Path],
    settings: RunSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(growing, "FIRST_AFTER_S", 0.0)
    monkeypatch.setattr(growing, "EVERY_S", 0.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = replace(settings, infile=make(tmp_path))
    seen: dict[int, Any] = {}
    began: list[bool] = []

    async def answer_some(service: DispatchService, most: int) -> None:
        while most > 0 and not service.queue.is_complete:
            items = (await service.get_work("w", min(60, most), 10.0)).items
            for item in items:
                row = json.loads(item.content)
                assert seen.setdefault(item.work_id, row) == row
            # Every third result is lost with the kill, and its line is handed out again.
            await service.submit(
                [
                    ResultItem(i.work_id, json.dumps({"id": seen[i.work_id]["id"]}), i.run, i.lease)
                    for i in items
                    if most > 1000 or i.work_id % 3
                ]
            )
            most -= len(items)

    async def scenario() -> None:
        for _ in range(3):
            async with serving(settings) as service:
                began.append(isinstance(service._source, growing.GrowingSource))
                await answer_some(service, 150)
        async with serving(settings) as service:
            held = {lease.work_id for lease in service.queue.leases.values()}
            await service.submit([ResultItem(n, json.dumps({"id": seen[n]["id"]})) for n in held])
            await answer_some(service, 1 << 20)
            await completed(service)

    run(asyncio.wait_for(scenario(), 14))
    assert began[0]
    assert seen == dict(enumerate(ROWS))
    assert output(settings) == [{"id": row["id"]} for row in ROWS]
    run_file = load_run_file(settings.state_dir, Files())
    assert run_file is not None
    assert {"size", "kind", "original"} <= run_file["fingerprint"].keys()
