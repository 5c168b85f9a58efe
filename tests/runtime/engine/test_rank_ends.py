"""How engines whose model is divided among processes start and end, and what is refused before they do."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from ramet import Engine
from ramet.errors import BrokenModelFile, ConfigError, EngineStopped, OutOfMemory
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.loading import choose_device, load, run_rank
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.parallel.ranks import FirstRank
from ramet.runtime.types import SamplingParams

SIZES: dict[str, Any] = {"num_kv_tokens": 1024, "max_running_requests": 4, "device": "cpu", "num_threads": 1}


def rank_pids(engine: Engine) -> list[int]:
    """The processes of the other ranks."""
    assert engine._peers is not None
    return [process.pid for process in engine._peers._processes]


def is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **fields})


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (4, 2)])
def test_a_killed_rank_ends_the_engine_with_one_clear_error(size: int, rank: int) -> None:
    with Engine(TINY_MODEL, tp=size, **SIZES) as engine:
        pids = rank_pids(engine)
        assert len(pids) == size - 1
        running = [engine.submit("x" * n, params(max_tokens=900)) for n in (3, 5)]
        while not engine.stats()["num_running"]:
            time.sleep(0.01)
        pid = pids[rank - 1]
        os.kill(pid, signal.SIGKILL)
        for handle in running:
            with pytest.raises(EngineStopped, match=rf"in flight: rank {rank} \(process {pid}\) was killed by SIGKILL"):
                handle.result(timeout_s=60)
        with pytest.raises(EngineStopped, match=rf"the engine is stopped: rank {rank}"):
            engine.submit("y")
    assert not any(map(is_alive, pids))


def test_shutdown_ends_the_other_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    engine = Engine(TINY_MODEL, tp=2, **SIZES)
    pids = rank_pids(engine)
    engine.generate("x", params())
    engine.shutdown()
    assert not any(map(is_alive, pids))
    assert not torch.distributed.is_initialized()
    assert capfd.readouterr().err == ""


def test_ranks_end_when_the_first_one_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from ramet import Engine\n"
        "if __name__ == '__main__':\n"
        f"    engine = Engine({TINY_MODEL!r}, tp=2, **{SIZES!r})\n"
        "    print(*[process.pid for process in engine._peers._processes], flush=True)\n"
        "    input()\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert pids
    assert all(map(is_alive, pids))
    process.kill()
    process.communicate()
    deadline_s = time.monotonic() + 30
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline_s, "a rank outlives its engine"
        time.sleep(0.02)


def test_a_script_without_its_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"from ramet import Engine\nEngine({TINY_MODEL!r}, tp=2, **{SIZES!r})\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'must stand under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


def test_an_error_of_a_rank_at_the_start_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The KV pool of every rank is too large for this machine; nothing is left behind."""
    with pytest.raises(OutOfMemory, match="lower --num-kv-tokens"):
        Engine(TINY_MODEL, tp=2, **{**SIZES, "num_kv_tokens": 1 << 50})
    assert not torch.distributed.is_initialized()


def test_an_error_of_another_rank_is_raised_in_the_first_one(tmp_path: Path) -> None:
    path, config = tmp_path / "none.gguf", EngineConfig(tp=3, device="cpu", num_threads=1)
    peers = FirstRank(run_rank, (path, config, logging.WARNING), config.tp)
    with pytest.raises(BrokenModelFile, match=r"rank [12]: .*none\.gguf cannot be read"):
        peers.join(torch.device("cpu"))
    peers.close()


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("ramet.runtime.parallel.ranks.start_processes", refuse)


def test_sizes_that_do_not_divide_the_model_are_refused(no_start: None) -> None:
    with pytest.raises(ConfigError, match=r"4 heads, 2 KV heads and 80 inner features.*--tp may be 1, 2 or 4"):
        Engine(TINY_MODEL, tp=3, **SIZES)
    for wrong in (0, -1, 2.0, True, "2", None):
        with pytest.raises(ConfigError, match=rf"tp is {wrong!r} but must be an integer of at least 1"):
            EngineConfig.from_mapping({"tp": wrong})
    with pytest.raises(ConfigError, match="deterministic is True but must be False with tp > 1"):
        EngineConfig(tp=2, deterministic=True)


def test_a_model_that_was_loaded_whole_is_not_divided(no_start: None, tiny_model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="tp is 2, but the given model was loaded whole; give the model's name"):
        Engine(tiny_model, tp=2, **SIZES)


def test_more_ranks_than_gpus_are_refused(no_start: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match="tp is 4 from device cuda:0 on, but torch sees 2 CUDA devices; lower --tp to 2"
    ):
        Engine(TINY_MODEL, tp=4, **{**SIZES, "device": "auto"})
    with pytest.raises(ConfigError, match=r"from device cuda:1 on.*lower --tp to 1"):
        choose_device("cuda:1", 0, 2)
    assert [choose_device("cuda", rank, 2) for rank in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_device_has_a_number_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = [choose_device(name) for name in ("auto", "cuda", "cuda:0")]
    assert found == [torch.device("cuda", 1), torch.device("cuda", 1), torch.device("cuda", 0)]
    with pytest.raises(ConfigError, match=r"'cuda:2' but torch sees 2 CUDA devices.*CUDA_VISIBLE_DEVICES"):
        choose_device("cuda:2")


def test_an_engine_that_has_ended_leaves_a_gpu_before_the_next_one_loads(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graph:
        """What refers to itself, as a graph and its steps do."""

        def __init__(self) -> None:
            self.steps = self

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    gc.disable()
    try:
        left = weakref.ref(Graph())
        load(tiny_model, EngineConfig())
        assert left() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["", "x", "CPU", " cpu", "cpu:3", "meta", "mps", "cuda:-1", "cuda:x"])
def test_a_device_that_ramet_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device is .* but must be auto, cpu, cuda or cuda:N"):
        choose_device(name)
