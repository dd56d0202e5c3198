"""The GPUs of this slice of a node, as the environment names them.

CUDA_VISIBLE_DEVICES    indices, GPU or MIG ids; on ROCm the same as HIP_VISIBLE_DEVICES
ROCR_VISIBLE_DEVICES    ROCm: what the runtime shows, by index or id
HIP_VISIBLE_DEVICES     ROCm: indices that count inside of what ROCR_VISIBLE_DEVICES shows
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dispatcher.errors import UsageError

CUDA, ROCR, HIP = "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
_NOBODYS = ("-1", "nodevfiles")
"""What stands for "no GPU"; the second is Slurm's, for a job without any."""


def visible_gpus(env: Mapping[str, str]) -> list[str] | None:
    """Return the ids of the GPUs that the environment shows; None when it does not say."""
    inner = next((_ids(env[name]) for name in (HIP, CUDA) if name in env), None)
    if ROCR not in env:
        return inner
    outer = _ids(env[ROCR])
    if inner is None or not all(id_.isdecimal() for id_ in inner):
        return outer if inner is None else inner
    return [outer[index] for index in map(int, _inside(inner, len(outer)))]


def slice_environment(
    env: Mapping[str, str], place: int, count: int, devices: Path = Path("/dev")
) -> dict[str, str]:
    """Return what to set for the `place`-th task manager (from 0) of a node, `count` GPUs each.

    As `range_environment`.
    """
    return range_environment(env, place * count, count, f"task manager {place + 1}", devices)


def range_environment(
    env: Mapping[str, str], first: int, count: int, whose: str, devices: Path = Path("/dev")
) -> dict[str, str]:
    """Return what to set for an engine that has `count` GPUs from the `first` (from 0) on.

    Every variable that is set is set anew; with none, the GPUs found in `devices` are counted.
    Empty when there are none. Raises UsageError when there are too few.
    """
    end = first + count
    shown = visible_gpus(env)
    if shown is None:
        name, found = _found(devices)
        if found == 0:
            return {}
        shown, names = [str(index) for index in range(found)], [name]
        where = f"{devices} shows {found}"
    else:
        names = [name for name in (CUDA, ROCR, HIP) if name in env]
        where = f"{_as_set(env)} names {len(shown)}"
    if len(shown) < end:
        raise UsageError(
            f"{whose} of this node needs the GPUs {first + 1} to {end}, but {where}; start "
            "fewer task managers or engines, lower --tensor-parallel, or let several share one by "
            f"naming it several times, as in {names[0]}=0,0"
        )
    mine = ",".join(shown[first:end])
    if ROCR not in names:
        return dict.fromkeys(names, mine)
    # What is inside of ROCR_VISIBLE_DEVICES is counted from 0 again.
    inside = ",".join(str(index) for index in range(count))
    return {ROCR: mine, **{name: inside for name in (CUDA, HIP) if name in names}}


def engine_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return what an engine needs beside the variables that are set.

    Ray, and with it vLLM, refuses ROCR_VISIBLE_DEVICES alone ("Please use HIP_VISIBLE_DEVICES
    instead of ROCR_VISIBLE_DEVICES"); Slurm sets nothing else on many sites. The same GPUs, counted
    inside of it, satisfy both.
    """
    if ROCR not in env or HIP in env or CUDA in env:
        return {}
    count = len(_ids(env[ROCR]))
    return {HIP: ",".join(str(index) for index in range(count))} if count else {}


def check_gpus(env: Mapping[str, str], tensor_parallel: int) -> None:
    """Raise UsageError when the environment shows fewer GPUs than the model is spread over."""
    shown = visible_gpus(env)
    if shown is not None and tensor_parallel > max(1, len(shown)):
        raise UsageError(
            f"--tensor-parallel {tensor_parallel} needs {tensor_parallel} GPUs, but "
            f"{_as_set(env)} names {len(shown)}; ask the cluster for more, or lower it"
        )


def _ids(text: str) -> list[str]:
    """Return the ids up to the first that is none, where the runtimes stop, too."""
    found: list[str] = []
    for id_ in (part.strip() for part in text.split(",")):
        if not id_ or id_.lower() in _NOBODYS:
            break
        found.append(id_)
    return found


def _inside(indices: list[str], count: int) -> list[str]:
    """Return the indices up to the first that does not exist."""
    wrong = (n for n, index in enumerate(indices) if int(index) >= count)
    return indices[: next(wrong, len(indices))]


def _found(devices: Path) -> tuple[str, int]:
    """Return the variable that picks among the GPUs of this machine, and how many they are."""
    if nvidia := len(list(devices.glob("nvidia[0-9]*"))):
        return CUDA, nvidia
    if (devices / "kfd").exists():
        return HIP, len(list((devices / "dri").glob("renderD*")))
    return CUDA, 0


def _as_set(env: Mapping[str, str]) -> str:
    return " ".join(f"{name}={env[name]}" for name in (CUDA, ROCR, HIP) if name in env)
