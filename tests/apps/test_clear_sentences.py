"""Mistakes of files and command lines that Hydra answers with a stack trace, or with an error that names no file."""

from __future__ import annotations

from pathlib import Path

import pytest

import danling_conf
from danling_conf import ConfigRefused
from danling_conf.command import run_command
from danling_conf.launch.app import App

pytestmark = pytest.mark.composition

LONG = "x" * 300
FILES = {
    "train": "defaults: [danling, _self_]\nsteps: 3\nmodel: {width: 4}\n",
    "circle": "defaults: [other, danling, _self_]\nsteps: 3\n",
    "other": "defaults: [circle, _self_]\n",
    "itself": "defaults: [danling, itself, _self_]\n",
    "interpolated": "defaults: [danling, _self_]\nsteps: 3\nmodel: {a: '${model.b}', b: '${model.a}'}\n",
    "number": "3\n",
    "items": "[a, b]\n",
    "text_defaults": "defaults: danling\n",
    "lion": "defaults: [danling, {optim: lion}, _self_]\nsteps: 3\n",
    "missing": "defaults: [danling, _self_]\nsteps: 3\ndata:\n  path: ???\n",
}


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conf")
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "latin.yaml").write_bytes(b"defaults: [danling, _self_]\nsteps: 3\nexperiment: caf\xe9\n")
    (folder / "group").mkdir()
    (folder / "group/latin.yaml").write_bytes(b"name: caf\xe9\n")
    return folder


@pytest.mark.parametrize(
    ("name", "overrides", "path", "said"),
    [
        ("circle", [], "circle.yaml", "circle -> other -> circle"),
        ("itself", [], "itself.yaml", "itself -> itself"),
        ("interpolated", [], "model.a", "it comes back to itself"),
        ("number", [], "number.yaml", "a config file holds a mapping"),
        ("items", [], "items.yaml", "a config file holds a mapping"),
        ("text_defaults", [], "text_defaults.yaml", "defaults must be a list"),
        ("latin", [], "latin.yaml", "not encoded as UTF-8: byte 0xe9"),
        ("train", ["+group=latin"], "group/latin.yaml", "not encoded as UTF-8"),
        ("lion", [], "optim", "optim.type=package.Class"),
        ("train", ["optim=lion"], "optim", "any class of torch.optim by optim.type=NAME"),
        ("train", ["scheduler=lion"], "scheduler", "scheduler.type=package.Class"),
        ("missing", [], "data.path", "it must be given"),
        ("train", ["~seed"], "~seed", "leave it out"),
        ("train", ["~seeed"], "~seeed", "did you mean ~seed?"),
        ("train", ["~model.widht"], "~model.widht", "did you mean ~model.width?"),
        ("train", ["~steps"], "~steps", "write steps=null"),
        ("train", ["~optim.lr"], "~optim.lr", "cannot be removed"),
        ("train", ["++sed=3"], "sed", "did you mean seed?"),
        ("train", ["seed=???"], "seed", "it must be given"),
        ("train", ["optim=???"], "optim", "there is no such choice"),
        ("train", [f"experiment={LONG}"], "experiment", "at most 255 bytes"),
        ("train", [f"{LONG}=3"], LONG, "a key has at most 255 bytes"),
        ("train", ["parallel=fsdp100000000000000000000"], "parallel", "more than 1048576 ranks"),
        ("train", ["parallel.axes.shard=100000000000000000000"], "parallel.axes.shard", "at most 1048576"),
    ],
)
def test_one_clear_sentence(conf: Path, name: str, overrides: list[str], path: str, said: str) -> None:
    with pytest.raises(ConfigRefused) as caught:
        danling_conf.compose(overrides, config_path=conf, config_name=name)
    found = {item.path: str(item) for item in caught.value.violations}
    assert said in found[path]


@pytest.mark.parametrize("arguments", [["-m", "--cfg", "job"], ["-m", "--info", "config", "seed=1,2"]])
def test_a_sweep_shows_no_single_configuration(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    app = App(function=print, script=Path(__file__), config_path=None, config_name="danling")
    with pytest.raises(SystemExit) as ended:
        run_command(app, arguments)
    assert ended.value.code == 2
    assert f"{arguments[1]}={arguments[2]}\n      it shows one configuration" in capsys.readouterr().err


def test_removing_a_key_of_a_file(conf: Path) -> None:
    assert danling_conf.compose(["~model.width"], config_path=conf, config_name="train").model == {}
