"""Packed compile caches: what one run has compiled, for another process, machine or user.

An artifact is inductor's cache directory in one file. torch's own artifacts (`torch.compiler.save_cache_artifacts`)
hold no C++ kernels, each of which is then built again. Inductor finds code in its directory by a hash of what it was
made from, so an artifact that does not fit costs time and never a result. Damage is another matter: the file has a
checksum of everything in it, and one that is not whole is passed over.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import platform
import shutil
import socket
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from danling_conf._torch_private.compiling import forget_compiled_code, movable_kernels
from danling_conf.parallel.compile import CACHE_DIRECTORY, TRITON_DIRECTORY
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.files import ARTIFACT_FACTS, ARTIFACT_NAME
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.topology.layout import coordinates

_log = logging.getLogger(__name__)

_OWN = ("precompile_artifact_dir", "precompile_artifact_max_days", "precompile_artifact_max_gb")
_LOCKS = (".lock", ".tmp")
"""Files that inductor needs only while it writes."""
_CHUNK = 1 << 20
_DAY = 86400.0


class Damaged(ValueError):
    """An artifact that is not used; `str()` says why."""


class Artifact:
    """The artifact of a run, and the directory of this machine that inductor works in meanwhile.

    Args:
        section: of the configuration, with a `precompile_artifact_dir`.
        facts: what the artifact is for, see `facts`; they name the file.
        writes: whether this rank writes the file; one of those with the same facts does.
    """

    def __init__(self, section: CompileConfig, facts: Mapping[str, Any], *, writes: bool) -> None:
        self._section, self._writes = section, writes
        self.facts = json.loads(json.dumps(facts, default=str))
        key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self.file = Path(section.precompile_artifact_dir or "").expanduser() / ARTIFACT_NAME.format(key)
        self.directory = Path(os.environ[CACHE_DIRECTORY]) / "artifacts" / key
        """What inductor reads and writes."""
        self._packed: frozenset[str] | None = None
        """The names in the file, as far as this rank knows."""

    def start(self) -> None:
        """Let inductor work in `directory`, with what the artifact holds. What is compiled from now on stays there."""
        self.directory.mkdir(parents=True, exist_ok=True)
        os.environ[CACHE_DIRECTORY] = str(self.directory)
        os.environ[TRITON_DIRECTORY] = str(self.directory / "triton")
        forget_compiled_code()
        movable_kernels()
        try:
            self._packed = unpack(self.file, self.directory, self.facts)
        except FileNotFoundError:
            return
        except (Damaged, OSError) as error:
            if self._writes:
                _log.warning("compile artifact %s is passed over, the run compiles: %s", self.file, error)
            return
        if self._writes:
            _touch(self.file)

    def save(self) -> None:
        """Write the file where something was compiled that it does not hold. A failure costs the next run its time and
        does not end this one."""
        if not self._writes:
            return
        folder, days = self.file.parent, self._section.precompile_artifact_max_days
        limit = int(self._section.precompile_artifact_max_gb * 1e9)
        try:
            names = frozenset(_names(self.directory))
            if not names or (self._packed is not None and names <= self._packed):
                return
            size = sum((self.directory / name).stat().st_size for name in names)
            if size > limit:
                raise OSError(f"its {size} bytes are more than compile.precompile_artifact_max_gb allows")
            folder.mkdir(parents=True, exist_ok=True)
            self._packed = pack(self.directory, self.file, self.facts)
            prune(folder, keep=self.file, days=days, bytes=limit)
            _prune_directories(self.directory.parent, keep=self.directory, days=days)
        except OSError as error:
            _log.warning("compile artifact %s is not written: %s", self.file, error)


def begin(
    section: CompileConfig,
    parts: Sequence[nn.Module],
    *,
    layout: Layout,
    rank: int,
    device: torch.device,
    precision: str | None,
    batch_size: int,
) -> Artifact | None:
    """The artifact of a run, started; None where the section has no directory for it. To be called after the compile
    section is configured, and before something is compiled."""
    if not section.enable or section.precompile_artifact_dir is None:
        return None
    place = coordinates(layout, rank)
    found = facts(section, parts, layout, place["pipeline"], device, precision, batch_size)
    # The ranks of a stage compile the same code.
    artifact = Artifact(section, found, writes=all(place[axis] == 0 for axis in WORLD_AXES if axis != "pipeline"))
    artifact.start()
    return artifact


def facts(
    section: CompileConfig,
    parts: Sequence[nn.Module],
    layout: Layout,
    stage: int,
    device: torch.device,
    precision: str | None,
    batch_size: int,
) -> dict[str, Any]:
    """What compiled code depends on, as far as it is known before anything is compiled."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": _device(device),
        # Kernels are built for this very CPU: on another one they may end the process by an illegal instruction.
        "cpu": f"{platform.machine()} {zlib.crc32(_cpu_flags().encode()):08x}",
        "compile": {
            item.name: getattr(section, item.name)
            for item in fields(CompileConfig)
            if item.name not in _OWN and not item.name.startswith("_")
        },
        "precision": precision,
        "layout": asdict(layout),
        "stage": stage,
        "model": [type(part).__qualname__ for part in parts],
        "parameters": _parameters(parts),
        "batch_size": batch_size,
    }


def pack(directory: Path, file: Path, facts: Mapping[str, Any]) -> frozenset[str]:
    """Write a cache directory as an artifact: aside, and then renamed, so that a reader finds a whole one.

    Returns:
        The names in it. Raises OSError.
    """
    content: dict[str, bytes] = {}
    for name in _names(directory):
        try:
            content[name] = (directory / name).read_bytes()
        except FileNotFoundError:
            continue  # another process has tidied up
    sums = {name: [len(data), zlib.crc32(data)] for name, data in content.items()}
    header = json.dumps({"facts": facts, "files": sums}, sort_keys=True).encode()
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    aside = file.with_name(f".{file.name}.{writer}.tmp")
    try:
        with open(aside, "wb") as target:
            with tarfile.open(fileobj=target, mode="w") as archive:
                for name, data in {ARTIFACT_FACTS: header, **content}.items():
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mode = len(data), 0o644
                    archive.addfile(entry, io.BytesIO(data))
            target.flush()
            os.fsync(target.fileno())
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)
    return frozenset(content)


def unpack(file: Path, directory: Path, facts: Mapping[str, Any]) -> frozenset[str]:
    """Put what an artifact holds into a cache directory, where it is not there yet. Nothing of one that is damaged.

    Returns:
        The names in it.

    Raises:
        Damaged: it is not whole, for something else, or anybody may have written it.
        OSError: it cannot be read, or the directory not be written.
    """
    for path in (file.parent, file):
        mode = path.stat().st_mode
        if mode & 0o002 and not mode & 0o1000:
            raise Damaged(f"everybody may write to {path}, and loading it runs its code")
    try:
        with tarfile.open(file, mode="r:") as archive:
            sums = _checked_header(archive, facts)
            for name, (size, crc) in sums.items():
                if _sum(archive, name) != (size, crc):
                    raise Damaged(f"its part {name} has another checksum than when it was written")
            for name in sums:
                _place(archive, name, directory / name)
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise Damaged(f"it is no whole archive ({error})") from error
    return frozenset(sums)


def prune(folder: Path, *, keep: Path, days: float, bytes: int) -> None:
    """Remove artifacts that nobody has used for `days`, then the longest unused ones until all together are not larger
    than `bytes`; and what writers that were killed have left. `keep` stays."""
    now = time.time()
    found = []
    for path in folder.iterdir():
        if not path.match(ARTIFACT_NAME.format("*")) and not path.match("." + ARTIFACT_NAME.format("*") + ".*.tmp"):
            continue
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # another run prunes as well
        if path.suffix == ".tmp":
            if now - status.st_mtime > _DAY:
                path.unlink(missing_ok=True)
        elif path != keep:
            found.append((status.st_mtime, status.st_size, path))
    total = keep.stat().st_size + sum(size for _, size, _ in found)
    for used, size, path in sorted(found):
        if now - used > days * _DAY or total > bytes:
            path.unlink(missing_ok=True)
            total -= size
            _log.info("compile artifact %s is removed: unused since %s", path, time.ctime(used))


def _prune_directories(folder: Path, *, keep: Path, days: float) -> None:
    for path in folder.iterdir():
        if path != keep and path.is_dir() and time.time() - path.stat().st_mtime > days * _DAY:
            shutil.rmtree(path, ignore_errors=True)


def _checked_header(archive: tarfile.TarFile, expected: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Size and checksum of each file in an artifact for what is `expected`."""
    first = archive.next()
    member = archive.extractfile(first) if first is not None and first.name == ARTIFACT_FACTS else None
    if member is None:
        raise Damaged("it is no compile artifact")
    try:
        header = json.loads(member.read())
        found, files = header["facts"], header["files"]
        sums = {str(name): (int(size), int(crc)) for name, (size, crc) in files.items()}
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"its description cannot be read ({error})") from error
    if differing:
        raise Damaged(f"it was made for another {', '.join(differing)}")
    for name in sums:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise Damaged(f"its part {name} is outside of a cache")
    return sums


def _blocks(archive: tarfile.TarFile, name: str) -> Iterator[bytes]:
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise Damaged(f"its part {name} is missing")
    while block := member.read(_CHUNK):
        yield block


def _sum(archive: tarfile.TarFile, name: str) -> tuple[int, int]:
    size, crc = 0, 0
    for block in _blocks(archive, name):
        size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _place(archive: tarfile.TarFile, name: str, target: Path) -> None:
    if target.exists():
        return  # names are hashes of what is in the files
    target.parent.mkdir(parents=True, exist_ok=True)
    # Every rank of a machine may be here at once: each writes aside, and the last rename wins.
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        for block in _blocks(archive, name):
            file.write(block)
    os.replace(aside, target)


def _names(directory: Path) -> list[str]:
    """The files of a cache directory that another process can use, relative to it."""
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.suffix not in _LOCKS and path.is_file()
    )


def _touch(file: Path) -> None:
    try:
        os.utime(file)
    except OSError:
        _log.debug("%s belongs to somebody else: its age counts from when it was written", file)


def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    module = torch.get_device_module(device)
    capability = module.get_device_capability(device) if hasattr(module, "get_device_capability") else ""
    return f"{device.type} {module.get_device_name(device)} {capability}"


def _cpu_flags() -> str:
    """What the CPU can do: the flags that Linux lists, elsewhere what torch chooses its own kernels by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), None)
    return flags or torch.backends.cpu.get_cpu_capability()


def _parameters(parts: Sequence[nn.Module]) -> str:
    """A hash of the names, shapes and dtypes of all parameters, and of which are trained."""
    listed = [
        (name, tuple(item.shape), str(item.dtype), item.requires_grad)
        for part in parts
        for name, item in part.named_parameters()
    ]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
