"""Devices are counted without torch: CUDA_VISIBLE_DEVICES and what nvidia-smi lists."""

from __future__ import annotations

import os

import pytest

from danling_conf.topology.machine import count_devices, this_machine
from tests.support.command_line import fake_nvidia_smi


@pytest.fixture
def four_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(fake_nvidia_smi(tmp_path, 4)) + os.pathsep + os.environ["PATH"])
    count_devices.cache_clear()
    yield
    count_devices.cache_clear()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 4),
        ("0", 1),
        ("0,1", 2),
        ("3, 1", 2),
        ("0,1,2,3", 4),
        ("GPU-0,GPU-2", 2),
        ("", 0),
        (" ", 0),
        ("-1", 0),
        # CUDA stops at the first entry that is none.
        ("0,-1,2", 1),
        ("-1,0", 0),
        ("0,,2", 1),
        ("0,1,2,3,4,5,6,7", 4),
        ("4,0", 0),
        ("GPU-0,GPU-1,GPU-2,GPU-3,GPU-4", 4),
        # It shows none when one is named twice.
        ("0,1,0", 0),
    ],
)
@pytest.mark.usefixtures("four_devices")
def test_visible_devices(visible, expected):
    assert count_devices(visible) == expected


@pytest.mark.usefixtures("four_devices")
def test_the_machine_has_the_devices_that_its_environment_shows():
    assert this_machine({}).devices == this_machine({}).fill_world_size == 4
    assert this_machine({"CUDA_VISIBLE_DEVICES": "1"}).devices == 1


@pytest.mark.parametrize(("devices", "code"), [(0, 0), (0, 9), (4, 9)])
def test_a_driver_that_fails_shows_no_devices(tmp_path, monkeypatch, devices, code):
    monkeypatch.setenv("PATH", str(fake_nvidia_smi(tmp_path, devices, code)) + os.pathsep + os.environ["PATH"])
    count_devices.cache_clear()
    assert count_devices(None) == 0
    count_devices.cache_clear()


def test_a_machine_without_the_tool_has_no_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    count_devices.cache_clear()
    assert count_devices(None) == count_devices("0,1") == 0
    count_devices.cache_clear()


@pytest.mark.parametrize(("tool", "environment"), [("g++", {}), ("clang++", {}), ("mine", {"CXX": "mine"})])
def test_a_compiler_and_the_headers_are_looked_for(tmp_path, monkeypatch, tool, environment):
    for name, value in {"CUDA_VISIBLE_DEVICES": "", **environment}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    assert not this_machine().can_compile()
    (tmp_path / "tools" / tool).touch(mode=0o755)
    assert this_machine().can_compile()
    (tmp_path / "Python.h").unlink()
    assert not this_machine().can_compile()


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 2),
    ],
)
def test_a_world_of_one_was_not_started_unless_by_torchrun(environment, started):
    assert this_machine({"CUDA_VISIBLE_DEVICES": "", **environment}).started_world_size == started
