"""Which GPUs a task manager has, and which part of a node's it gives to each of several."""

from __future__ import annotations

from pathlib import Path

import pytest

from dispatcher.errors import UsageError
from dispatcher.taskmanager.backend.gpus import (
    CUDA,
    HIP,
    ROCR,
    check_gpus,
    engine_environment,
    range_environment,
    slice_environment,
    visible_gpus,
)

UUIDS = ["GPU-4b2c1a9f-8d3e", "GPU-11111111-2222"]
MIGS = ["MIG-77777777-aaaa", "MIG-88888888-bbbb"]


def nvidia_node(tmp_path: Path, count: int) -> Path:
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{n}" for n in range(count))):
        (tmp_path / name).touch()
    return tmp_path


def rocm_node(tmp_path: Path, count: int) -> Path:
    (tmp_path / "kfd").touch()
    (tmp_path / "dri").mkdir()
    for name in ("card0", *(f"renderD{128 + n}" for n in range(count))):
        (tmp_path / "dri" / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"OTHER": "1"}, None),
        ({CUDA: "2,3"}, ["2", "3"]),
        ({CUDA: " 2 , 3 "}, ["2", "3"]),
        ({CUDA: ",".join(UUIDS)}, UUIDS),
        ({CUDA: ",".join(MIGS)}, MIGS),
        ({CUDA: ""}, []),
        ({CUDA: "-1"}, []),
        ({CUDA: "NoDevFiles"}, []),
        ({CUDA: "0,-1,2"}, ["0"]),
        ({HIP: "4,5"}, ["4", "5"]),
        ({ROCR: "4,5,6"}, ["4", "5", "6"]),
        ({ROCR: "4,5,6", HIP: "0,2"}, ["4", "6"]),
        ({ROCR: "4,5,6", CUDA: "1"}, ["5"]),
        ({ROCR: "4,5", HIP: "1,2,0"}, ["5"]),
        ({ROCR: ",".join(UUIDS), HIP: "1"}, UUIDS[1:]),
        ({ROCR: "", HIP: "0"}, []),
        ({ROCR: "0,1", HIP: UUIDS[0]}, UUIDS[:1]),
        ({HIP: "1,2", CUDA: "1,2"}, ["1", "2"]),
    ],
)
def test_the_variables_say_which_gpus_are_there(
    env: dict[str, str], expected: list[str] | None
) -> None:
    assert visible_gpus(env) == expected


@pytest.mark.parametrize(
    ("env", "place", "count", "expected"),
    [
        ({CUDA: "4,5,6,7"}, 0, 1, {CUDA: "4"}),
        ({CUDA: "4,5,6,7"}, 3, 1, {CUDA: "7"}),
        ({CUDA: "4,5,6,7"}, 1, 2, {CUDA: "6,7"}),
        ({CUDA: ",".join(MIGS)}, 1, 1, {CUDA: MIGS[1]}),
        ({CUDA: "0,0"}, 1, 1, {CUDA: "0"}),
        ({HIP: "4,5,6,7"}, 1, 2, {HIP: "6,7"}),
        ({HIP: "4,5", CUDA: "4,5"}, 1, 1, {HIP: "5", CUDA: "5"}),
        ({ROCR: "4,5,6,7"}, 1, 2, {ROCR: "6,7"}),
        ({ROCR: "4,5,6,7", HIP: "0,1,2,3"}, 1, 2, {ROCR: "6,7", HIP: "0,1"}),
        ({ROCR: "4,5,6,7", HIP: "3,1"}, 1, 1, {ROCR: "5", HIP: "0"}),
        ({ROCR: "4,5", HIP: "0,1", CUDA: "0,1"}, 1, 1, {ROCR: "5", HIP: "0", CUDA: "0"}),
    ],
)
def test_each_task_manager_gets_its_own_gpus_by_every_variable_that_is_set(
    env: dict[str, str], place: int, count: int, expected: dict[str, str]
) -> None:
    assert slice_environment(env, place, count) == expected


@pytest.mark.parametrize("env", [{ROCR: "4,5,6,7"}, {ROCR: "4,5,6,7", HIP: "3,2,1,0"}])
def test_a_slice_shows_what_it_was_cut_from(env: dict[str, str]) -> None:
    whole = visible_gpus(env)
    assert whole is not None
    parts = [visible_gpus({**env, **slice_environment(env, n, 2)}) for n in range(2)]
    assert parts == [whole[:2], whole[2:]]


def test_without_a_variable_the_gpus_of_the_machine_are_counted(tmp_path: Path) -> None:
    assert slice_environment({}, 1, 2, nvidia_node(tmp_path, 12)) == {CUDA: "2,3"}


def test_without_a_variable_the_gpus_of_a_rocm_machine_are_counted(tmp_path: Path) -> None:
    assert slice_environment({}, 3, 1, rocm_node(tmp_path, 4)) == {HIP: "3"}


def test_a_machine_without_gpus_sets_nothing(tmp_path: Path) -> None:
    assert slice_environment({}, 5, 1, tmp_path) == {}


def test_too_few_gpus_for_all_task_managers_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        slice_environment({CUDA: "4,5,6"}, 1, 2)
    assert str(caught.value).startswith(
        "task manager 2 of this node needs the GPUs 3 to 4, but CUDA_VISIBLE_DEVICES=4,5,6 names 3;"
    )
    with pytest.raises(UsageError, match="shows 3"):
        slice_environment({}, 3, 1, nvidia_node(tmp_path, 3))


def test_engines_of_one_task_manager_follow_each_other_on_its_gpus() -> None:
    env = {CUDA: "4,5,6"}
    assert range_environment(env, 0, 2, "the backend a") == {CUDA: "4,5"}
    assert range_environment(env, 2, 1, "the backend b") == {CUDA: "6"}
    with pytest.raises(UsageError, match="the backend c of this node needs the GPUs 3 to 4"):
        range_environment(env, 2, 2, "the backend c")


def test_a_model_spread_over_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        check_gpus({CUDA: "0,1"}, 4)
    assert str(caught.value) == (
        "--tensor-parallel 4 needs 4 GPUs, but CUDA_VISIBLE_DEVICES=0,1 names 2; ask the cluster "
        "for more, or lower it"
    )
    with pytest.raises(UsageError, match="ROCR_VISIBLE_DEVICES=0,1,2 HIP_VISIBLE_DEVICES=0 names"):
        check_gpus({ROCR: "0,1,2", HIP: "0"}, 2)


@pytest.mark.parametrize("env", [{}, {CUDA: "0,1"}, {ROCR: "0,1", HIP: "0,1"}])
def test_a_model_that_fits_or_might_is_not_refused(env: dict[str, str]) -> None:
    check_gpus(env, 2)


def test_a_model_on_one_device_may_run_without_a_gpu() -> None:
    check_gpus({CUDA: ""}, 1)


def test_an_engine_that_refuses_rocr_alone_is_told_the_same_gpus_by_hip() -> None:
    assert engine_environment({ROCR: "5,6"}) == {HIP: "0,1"}


@pytest.mark.parametrize(
    "env", [{}, {CUDA: "0"}, {ROCR: "5", HIP: "0"}, {ROCR: "5", CUDA: "0"}, {ROCR: ""}]
)
def test_an_engine_that_can_read_its_variables_is_told_nothing_more(env: dict[str, str]) -> None:
    assert engine_environment(env) == {}
