"""Packed compile caches: whole or passed over, one name for one purpose, old ones removed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from danling_conf.parallel import artifacts
from danling_conf.parallel import compile as compilation
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.layout import Layout

FACTS = {"torch": "2.13", "layout": {"shard": 2}}
CONTENT = {"ab/code.py": b"print()", "ab/kernel.so": bytes(range(256)) * 40, "fxgraph/cd/" + "e" * 120: b"graph"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache directory as inductor leaves it."""
    for name, data in {**CONTENT, "locks/one.lock": b"", "ab/.half.1.tmp": b"x"}.items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "kept").mkdir(mode=0o755)
    return tmp_path / "kept" / "compile-0.tar"


def files(folder: Path) -> dict[str, bytes]:
    return {item.relative_to(folder).as_posix(): item.read_bytes() for item in folder.rglob("*") if item.is_file()}


def test_what_is_packed_is_unpacked(cache: Path, file: Path, tmp_path: Path) -> None:
    """Without locks and half-written files; what is there already stays."""
    assert artifacts.pack(cache, file, FACTS) == CONTENT.keys()
    assert os.listdir(file.parent) == [file.name]
    target = tmp_path / "new"
    (target / "ab").mkdir(parents=True)
    (target / "ab" / "code.py").write_bytes(b"mine")
    assert artifacts.unpack(file, target, FACTS) == CONTENT.keys()
    assert files(target) == {**CONTENT, "ab/code.py": b"mine"}


def test_damage_anywhere_is_found_and_nothing_is_unpacked(cache: Path, file: Path, tmp_path: Path) -> None:
    artifacts.pack(cache, file, FACTS)
    whole = file.read_bytes()
    names = sum(len(data) for data in CONTENT.values())
    cut = [0, 1, 511, 512, 600, names // 2, len(whole) // 2]
    broken = [whole[:length] for length in cut] + [b"\0" * len(whole), b"not a tar" * 99]
    for data in CONTENT.values():  # one bit of each part
        place = whole.index(data)
        broken.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for content in broken:
        file.write_bytes(content)
        with pytest.raises(artifacts.Damaged):
            artifacts.unpack(file, tmp_path / "new", FACTS)
        assert not (tmp_path / "new").exists()


def test_two_writers_and_a_reader_do_not_meet(cache: Path, file: Path, tmp_path: Path) -> None:
    """Whatever a reader finds is whole."""
    artifacts.pack(cache, file, FACTS)
    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(lambda: [artifacts.pack(cache, file, FACTS) for _ in range(30)]) for _ in range(2)]
        read = 0
        while read < 5 or not all(item.done() for item in writing):
            artifacts.unpack(file, tmp_path / f"new-{read}", FACTS)
            read += 1
        for item in writing:
            item.result()
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("found", [{**FACTS, "torch": "2.14"}, {"torch": "2.13"}])
def test_an_artifact_for_something_else_is_named(cache: Path, file: Path, found: dict[str, Any]) -> None:
    artifacts.pack(cache, file, found)
    with pytest.raises(artifacts.Damaged, match=r"made for another (torch|layout)"):
        artifacts.unpack(file, cache, FACTS)


@pytest.mark.parametrize("name", ["../out", "/tmp/out"])
def test_an_artifact_writes_nowhere_else(file: Path, tmp_path: Path, name: str) -> None:
    file.write_bytes(_archive({"artifact.json": b'{"facts": {}, "files": {"%s": [1, 1]}}' % name.encode(), name: b"x"}))
    with pytest.raises(artifacts.Damaged, match="outside of a cache"):
        artifacts.unpack(file, tmp_path / "new", {})


def test_what_everybody_may_write_is_not_run(cache: Path, file: Path) -> None:
    artifacts.pack(cache, file, FACTS)
    file.chmod(0o666)
    with pytest.raises(artifacts.Damaged, match="everybody may write"):
        artifacts.unpack(file, cache, FACTS)


def test_old_and_many_are_removed_and_the_own_one_stays(tmp_path: Path) -> None:
    def made(name: str, days: float, size: int = 100) -> Path:
        path = tmp_path / name
        path.write_bytes(bytes(size))
        os.utime(path, (time.time() - days * 86400,) * 2)
        return path

    own, old, third, second = (
        made(f"compile-{name}.tar", days) for name, days in zip("abcd", (99, 31, 3, 2), strict=True)
    )
    staged, fresh = made(".compile-e.tar.host.1.tmp", 2), made(".compile-e.tar.host.2.tmp", 0)
    other = made("my.tar", 99)
    artifacts.prune(tmp_path, keep=own, days=30, bytes=1000)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (own, third, second, fresh, other)}
    artifacts.prune(tmp_path, keep=own, days=30, bytes=250)
    assert not third.exists()
    assert second.exists()
    assert not old.exists()
    assert not staged.exists()


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with compilation.restored():
        yield tmp_path / "inductor"


def begin(section: CompileConfig, model: nn.Module, rank: int = 0, **changes: Any) -> artifacts.Artifact:
    given: dict[str, Any] = {"layout": Layout(), "device": torch.device("cpu"), "precision": None, "batch_size": 4}
    found = artifacts.begin(section, [model], rank=rank, **{**given, **changes})
    assert found is not None
    return found


def test_the_name_tells_what_it_is_for(inductor: Path, tmp_path: Path) -> None:
    """One for each purpose; neither the path nor the limits are a part of it."""
    section = CompileConfig(enable=True, precompile_artifact_dir=str(tmp_path / "kept"))
    same = [
        begin(section, nn.Linear(3, 4)),
        begin(replace(section, precompile_artifact_dir=str(tmp_path / "moved")), nn.Linear(3, 4)),
        begin(replace(section, precompile_artifact_max_days=3.0), nn.Linear(3, 4)),
        begin(section, nn.Linear(3, 4), layout=Layout()),
    ]
    others = [
        begin(section, nn.Linear(3, 5)),
        begin(section, nn.Linear(3, 4).requires_grad_(False)),
        begin(section, nn.Linear(3, 4, dtype=torch.bfloat16)),
        begin(section, nn.Linear(3, 4), precision="bf16"),
        begin(section, nn.Linear(3, 4), batch_size=5),
        begin(section, nn.Linear(3, 4), layout=Layout(replicate=2)),
        begin(replace(section, memory_policy="full"), nn.Linear(3, 4)),
        begin(replace(section, mode="max-autotune"), nn.Linear(3, 4)),
        *(begin(section, nn.Linear(3, 4), rank, layout=Layout(pipeline=2)) for rank in (0, 1)),
    ]
    assert {item.file.name for item in same} == {same[0].file.name}
    assert len({item.file.name for item in [same[0], *others]}) == len(others) + 1
    assert not section.enable or artifacts.begin(CompileConfig(enable=True), [], layout=Layout(), rank=0,
        device=torch.device("cpu"), precision=None, batch_size=1) is None  # fmt: skip


def test_one_rank_writes_and_all_read(inductor: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is compiled meanwhile is added; a damaged one is told and replaced; a failure to write ends nothing."""
    section = CompileConfig(enable=True, precompile_artifact_dir=str(tmp_path / "kept"))
    layout = Layout(replicate=2)
    model = nn.Linear(3, 4)
    first = begin(section, model, layout=layout)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inductor)  # as in the process of another rank
    second = begin(section, model, 1, layout=layout)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(first.directory) == str(second.directory)
    first.save()  # nothing is compiled yet
    (first.directory / "code.py").write_text("1")
    second.save()
    assert not first.file.exists()
    first.save()
    written = first.file.stat()
    first.save()
    assert first.file.stat().st_ino == written.st_ino
    (first.directory / "more.py").write_text("2")
    first.save()

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "elsewhere")
    other = begin(section, model, 1, layout=layout)
    assert sorted(files(other.directory)) == ["code.py", "more.py"]

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "third")
    first.file.write_bytes(first.file.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        third = begin(section, model, layout=layout)
        assert files(third.directory) == {}
        (third.directory / "code.py").write_text("1")
        third.save()
    (told,) = caplog.messages
    assert str(first.file) in told
    assert "passed over" in told
    assert artifacts.unpack(first.file, tmp_path / "fourth", third.facts) == {"code.py"}

    caplog.clear()
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with caplog.at_level(logging.WARNING):
        late = begin(replace(section, precompile_artifact_dir=str(blocked / "kept")), model, layout=layout)
        (late.directory / "new.py").write_text("1")
        late.save()
    assert "not written" in caplog.messages[-1]

    with caplog.at_level(logging.WARNING):
        small = begin(replace(section, precompile_artifact_max_gb=1e-9), model, layout=layout, batch_size=9)
        (small.directory / "new.py").write_text("12")
        small.save()
    assert "precompile_artifact_max_gb" in caplog.messages[-1]
    assert not small.file.exists()


def _archive(content: dict[str, bytes]) -> bytes:
    import io
    import tarfile

    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return target.getvalue()
