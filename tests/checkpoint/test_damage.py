"""Damage to every file of a checkpoint, and what each road that reads it says: a sentence, or the right result."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_conf import ConfigRefused, load_weights
from danling_conf.checkpoint.fit import ModelDiffers
from danling_conf.checkpoint.loading import LayoutDiffers
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.checkpoint.manifest import Broken
from danling_conf.checkpoint.weight_sources import NothingSaved
from danling_conf.cli.main import main
from danling_conf.schema.checkpoint import CheckpointConfig
from danling_conf.schema.layout import Layout
from tests.checkpoint.test_files import sign
from tests.support.resumed_runs import splits, start, train
from tests.support.small import DropoutNet, Net, equal, loss

pytestmark = pytest.mark.slow

STEPS = 3
BACKENDS = ("file", "dcp")
LIMIT = 20
"""Seconds after which a road hangs."""


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def deep(path: Path) -> None:
    path.write_bytes(b"[" * 200_000)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def unreadable(path: Path) -> None:
    path.chmod(0)


def refuse_to_root(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file without permissions be one for root as well."""
    real = os.open

    def refuse(name: Any, *arguments: Any, **options: Any) -> int:
        if os.path.realpath(os.fsdecode(name)) == os.path.realpath(path):
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)


DAMAGES = (half, emptied, flipped, longer, deep, Path.unlink, directory, fifo, loop, nowhere, endless, unreadable)


@contextmanager
def watched() -> Iterator[None]:
    """Fails what hangs."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"it hangs for {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A run of each backend, with a checkpoint of every step and an export of the last; `good` are its weights by
    step."""
    found = {}
    for backend in BACKENDS:
        saving = {"interval": 1, "export_dtype": "fp32", "backend": backend}
        done = train(tmp_path_factory.mktemp(backend), {"steps": STEPS, "checkpoint": saving})
        good = {}
        for step in range(1, STEPS + 1):
            model = Net()
            load_weights(model, done["run"] / "checkpoints" / f"ckpt-s{step:08d}")
            good[step] = dict(model.state_dict())
        assert equal(good[STEPS], done["weights"])
        found[backend] = {**done, "good": good}
    return found


class Roads:
    """Every road that reads the checkpoints of a run."""

    def __init__(self, run: Path, scratch: Path, good: dict[int, dict[str, torch.Tensor]]) -> None:
        self.run, self.scratch, self.good = run, scratch, good
        self.newest = run / "checkpoints" / f"ckpt-s{STEPS:08d}"

    def _manager(self) -> CheckpointManager:
        section = CheckpointConfig(load_only=True)
        return CheckpointManager(section, self.scratch, rank=0, layout=Layout(), layout_name="single")

    def _restore(self, source: Path, *, choose: bool) -> str:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters())
        loaded = self._manager().loader.restore(source, parts=[model], optimizer=optimizer, choose=choose)
        assert equal(model.state_dict(), self.good[loaded.facts.step])
        return " ".join(loaded.notes) if loaded.facts.step != STEPS else ""

    def resume(self) -> str:
        return self._restore(self.run, choose=False)

    def auto_resume(self) -> str:
        return self._restore(self.run, choose=True)

    def pretrained(self) -> str:
        model = Net()
        self._manager().loader.load_weights(self.run, [model])
        assert equal(model.state_dict(), self.good[STEPS])
        return ""

    def pretrained_export(self) -> str:
        model = Net()
        self._manager().loader.load_weights(self.run / "checkpoints" / "export", [model])
        assert equal(model.state_dict(), self.good[STEPS])
        return ""

    def load_weights(self) -> str:
        model = Net()
        found = load_weights(model, self.run)
        assert equal(model.state_dict(), self.good[found.step or 0])
        return ""

    def export(self) -> int:
        return main(["export", str(self.run), str(self.scratch / "exported")])

    def checkpoints(self) -> int:
        return main(["checkpoints", str(self.run)])

    def verified(self) -> int:
        return main(["checkpoints", str(self.run), "--verify"])

    def report(self) -> int:
        return main(["report", str(self.run), "--html", str(self.scratch / "page.html")])


LOADING = ("resume", "auto_resume", "pretrained", "pretrained_export", "load_weights")
COMMANDS = ("export", "checkpoints", "verified", "report")


def outcome(road: Callable[[], Any]) -> str:
    """What a road says: its notes, or its error, which must be one of ours. Raises whatever else it raises."""
    with watched():
        try:
            return str(road() or "")
        except (Broken, ModelDiffers, LayoutDiffers, NothingSaved, ConfigRefused) as error:
            said = str(error)
    assert "weights_only" not in said
    return said


@pytest.fixture
def roads(runs: dict[str, dict[str, Any]], tmp_path: Path) -> Callable[[str], Roads]:
    def of(backend: str) -> Roads:
        run = tmp_path / "lin" / "exp" / runs[backend]["run"].name
        shutil.copytree(runs[backend]["run"], run, symlinks=True)
        return Roads(run, tmp_path, runs[backend]["good"])

    return of


CASES = [
    *(("file", f"ckpt-s{STEPS:08d}", file) for file in ("checkpoint.json", "state.pt", "shared.pt", "rank-0.pt")),
    *(("file", "export", file) for file in ("export.json", "model.safetensors")),
    *(("dcp", f"ckpt-s{STEPS:08d}", file) for file in (".metadata", "__0_0.distcp")),
]
"""Backend, folder and file; what both backends write alike is damaged in one of them."""


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda item: item.__name__)
@pytest.mark.parametrize(("backend", "place", "file"), CASES)
def test_damage_is_named_or_makes_no_difference(
    roads: Callable[[str], Roads],
    backend: str,
    place: str,
    file: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on = roads(backend)
    path = on.run / "checkpoints" / place / file
    damage(path)
    if damage is unreadable:
        refuse_to_root(path, monkeypatch)
    concerned = {"resume", "auto_resume"} if place != "export" else {"pretrained_export"}
    # A run's directory means the newer of both; where one cannot be read, it may be that.
    if place != "export" or file == "export.json":
        concerned |= {"pretrained", "load_weights"}
    for name in LOADING:
        caplog.clear()
        said = outcome(getattr(on, name)) + caplog.text
        if name in concerned:
            assert str(path) in said, (name, said)
    for name in COMMANDS:
        caplog.clear()
        shutil.rmtree(on.scratch / "exported", ignore_errors=True)
        code = outcome(getattr(on, name))
        shown = capsys.readouterr()
        said = shown.out + shown.err + caplog.text
        assert code in ("", "1", "2"), (name, code)
        assert "Traceback" not in said
        if name == "verified" or (name == "export" and "load_weights" in concerned):
            assert str(path) in said, (name, said)


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 1, "n_embd": 4}


@pytest.mark.parametrize(
    "content",
    [
        "", "3", "null", '"x"', "[" * 200_000, "{}",
        *(json.dumps(GPT2 | change) for change in (
            {"architectures": 3}, {"architectures": [3]}, {"architectures": ["AutoTokenizer"]}, {"model_type": 3},
            {"n_layer": "x"}, {"n_head": 0}, {"dtype": "float99"}, {"id2label": 3}, {},
        )),
    ],
)  # fmt: skip
def test_a_configuration_beside_an_export_that_is_damaged_or_of_another_model(
    roads: Callable[[str], Roads], content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are exported without a class of transformers, and the reason is shown."""
    pytest.importorskip("transformers")
    on = roads("file")
    (on.run / "checkpoints" / "export" / "config.json").write_text(content)
    assert outcome(on.export) == ""
    said = capsys.readouterr().out
    assert "plain safetensors, without a config.json: " in said
    assert (
        "config.json cannot be read" in said or "it cannot be built" in said or "names no" in said or "differs" in said
    )
    model = Net()
    load_weights(model, on.scratch / "exported")
    assert equal(model.state_dict(), on.good[STEPS])


@pytest.mark.parametrize("link", ["latest", "best"])
@pytest.mark.parametrize("damage", [Path.unlink, loop, nowhere, fifo], ids=lambda item: item.__name__)
def test_a_link_in_another_state(
    roads: Callable[[str], Roads], link: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """What it pointed to is found by its step."""
    on = roads("file")
    damage(on.run / "checkpoints" / link)
    for name in LOADING:
        assert outcome(getattr(on, name)) == "", name
    for name in COMMANDS:
        shutil.rmtree(on.scratch / "exported", ignore_errors=True)
        assert outcome(getattr(on, name)) in ("", "1"), name
    assert "Traceback" not in capsys.readouterr().err


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the values in nested tables and lists, down to what one writes by hand."""
    yield path
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in list(inner)[:3]:
        if len(path) < 5:
            yield from places(value, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a path."""
    if not path:
        return value
    if isinstance(tree, dict):
        return {key: replaced(item, path[1:], value) if key == path[0] else item for key, item in tree.items()}
    copies = [replaced(item, path[1:], value) if at == path[0] else item for at, item in enumerate(tree)]
    return type(tree)(copies)


def removed(tree: Any, path: tuple[Any, ...]) -> Any:
    """A copy without what is at a path."""
    if isinstance(tree, dict):
        return {
            key: removed(item, path[1:]) if key == path[0] else item
            for key, item in tree.items()
            if len(path) > 1 or key != path[0]
        }
    return type(tree)(
        removed(item, path[1:]) if at == path[0] else item
        for at, item in enumerate(tree)
        if len(path) > 1 or at != path[0]
    )


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def doubling() -> Any:
    value: Any = []
    for _ in range(60):
        value = [value, value]
    return value


VALUES: dict[str, Any] = {
    "nothing": None, "true": True, "negative": -1, "large": 1 << 80, "nan": float("nan"), "text": "x", "bytes": b"x",
    "empty list": [], "empty table": {}, "other keys": {1: 2, None: 3}, "a tensor": torch.zeros(2),
    "deep": nested(200), "itself": itself(), "doubling": doubling(),
}  # fmt: skip


def resumed(root: Path, checkpoint: Path) -> None:
    """As a user resumes, with a step more."""
    runner = start(root, {"steps": STEPS + 1, "checkpoint": {"load_only": True}, "resume": str(checkpoint)})
    try:
        runner.prepare(DropoutNet, splits(), loss=loss)
        for batch in runner.batches("train"):
            runner.step(batch)
    finally:
        runner.close()


def crafted(checkpoint: Path, file: str, change: Callable[[Any], Any]) -> None:
    """Change what a file of `torch.save` holds, and make the checksums fit."""
    content = torch.load(checkpoint / file, weights_only=True)
    torch.save(change(content), checkpoint / file)
    sign(checkpoint)


SAMPLE = [
    ("shared.pt", ("optimizer",), "empty table"),
    ("shared.pt", ("optimizer", "groups"), "empty list"),
    ("shared.pt", ("optimizer", "groups", 0, "options", "lr"), "text"),
    ("shared.pt", ("optimizer", "groups", 0, "names", 0), "negative"),
    ("shared.pt", ("optimizer", "values"), "other keys"),
    ("shared.pt", ("optimizer", "tensors"), "doubling"),
    ("shared.pt", ("runner", "global_step"), "negative"),
    ("shared.pt", ("runner", "global_step"), "text"),
    ("shared.pt", ("runner", "results"), "other keys"),
    ("shared.pt", ("runner", "score"), "empty table"),
    ("shared.pt", ("scheduler",), "other keys"),
    ("shared.pt", ("settings",), "itself"),
    ("shared.pt", ("settings",), "deep"),
    ("shared.pt", ("callbacks",), "text"),
    ("rank-0.pt", (), "a tensor"),
    ("rank-0.pt", ("loader",), "empty table"),
    ("rank-0.pt", ("loader", "_sampler_iter_state"), "other keys"),
    ("rank-0.pt", ("loader", "_sampler_iter_state", "samples_yielded"), "nothing"),
    ("rank-0.pt", ("loader", "_sampler_iter_state", "sampler_iter_state", "taken_by_all"), "bytes"),
    ("shared.pt", ("scheduler", "_step_count"), "nothing"),
    ("shared.pt", ("scheduler", "_step_count"), "a tensor"),
    ("shared.pt", ("scheduler", "base_lrs"), "bytes"),
    ("rank-0.pt", ("generators",), "empty table"),
    ("rank-0.pt", ("generators", "torch"), "text"),
    ("rank-0.pt", ("generators", "python"), "nan"),
    ("state.pt", (), "empty table"),
    ("state.pt", ("model.first.weight",), "text"),
    ("state.pt", ("optimizer.first.weight.exp_avg",), "a tensor"),
]


@pytest.mark.parametrize(("file", "path", "value"), SAMPLE)
def test_other_values_with_fitting_checksums(
    roads: Callable[[str], Roads], tmp_path: Path, file: str, path: tuple[Any, ...], value: str
) -> None:
    on = roads("file")
    crafted(on.newest, file, lambda tree: replaced(tree, path, VALUES[value]))
    with watched(), pytest.raises(ConfigRefused, match=r"ckpt-s0000000\d") as refusal:
        resumed(tmp_path, on.newest)
    assert "weights_only" not in str(refusal.value)
    if file != "state.pt":
        assert file in str(refusal.value) or on.newest.name in str(refusal.value)


def test_the_manifest_holds_facts_and_nothing_else(roads: Callable[[str], Roads]) -> None:
    from danling_conf.checkpoint import manifest

    on = roads("file")
    facts = json.loads((on.newest / "checkpoint.json").read_text())
    others = {
        "step": ["3", -1, True, None, 1.5], "degrees": [{"replicate": 0}, {"replicate": 10**9}, [1], {"x": 1}],
        "files": [{}, [], {"state.pt": {}}, {"state.pt": {"size": "1", "crc32": 2}}, {"..": {"size": 1, "crc32": 1}}],
        "saved": ["yesterday", 3], "optimizer": [None, []], "backend": [3, "tape"],
        "history": ["yes"], "fsdp": [1],
    }  # fmt: skip
    for name, values in others.items():
        for value in values:
            content = {key: item for key, item in facts.items() if key != "checksum"} | {name: value}
            content["checksum"] = manifest._checksum(content)
            (on.newest / "checkpoint.json").write_text(json.dumps(content))
            said = outcome(on.resume)
            assert str(on.newest) in said, (name, value, said)
            assert outcome(on.checkpoints) in ("", "1")


def test_a_pickle_that_doubles_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(doubling()))
    with watched(), pytest.raises(Broken, match="cannot be read as a checkpoint"):
        load_weights(Net(), tmp_path / "bomb.pt")
