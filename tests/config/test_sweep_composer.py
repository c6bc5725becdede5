"""Jobs that are composed once for each choice of groups are what Hydra's own launchers get, to the last flag."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.hydra_adapter import Composer, ConfigSearch, composer
from danling_conf.config.hydra_job import hydra_settings
from danling_conf.config.sweep_composer import SweepComposer

pytestmark = [pytest.mark.composition, pytest.mark.slow]

FILES = {
    "train.yaml": "defaults:\n  - danling\n  - model: small\n  - _self_\n"
    "steps: 3\ndata:\n  tag: ${hydra:job.name}-${seed}\n  numbers: [1, 2]\n",
    "plain.yaml": "defaults:\n  - danling\n  - model: small\n  - _self_\nsteps: 3\ndata:\n  numbers: [1, 2]\n",
    "model/small.yaml": "width: 8\n",
    "model/large.yaml": "width: 64\nlayers: {count: 4}\n",
    "recipe/fast.yaml": "# @package _global_\ndefaults:\n  - override /parallel: fsdp8\n"
    "  - override /model: large\nsteps: 9\n",
    "parallel/mine.yaml": "# @package _global_\ndefaults:\n  - fsdp8\n  - _self_\nfsdp:\n  limit_all_gathers: false\n",
}
FAULTLESS = [
    [],
    ["optim.lr=0.1", "steps=7"],
    ["parallel=fsdp8", "optim.lr=1e-3"],
    ["optim.lr=1e-3", "parallel=fsdp4_tp2", "seed=null"],
    ["parallel=mine", "compile=max"],
    ["+recipe=fast", "steps=11"],
    ["model=large", "model.layers.count=2"],
    ["+model@data.other=large"],
    ["~model"],
    ["~model=small"],
    ["~data.numbers"],
    ["~steps"],
    ["+data.extra={a: 1, b: [x, y]}"],
    ["++data.extra=[1,2,{c: null}]", "++steps=4"],
    ["data.numbers=[3,4,5]"],
    ["experiment='quoted, string'", 'lineage="two words"'],
    ["experiment=${lineage}-${optim.lr}"],
    ["++data.tag=${hydra:job.num}"],
    ["+data.home=${oc.env:HOME}"],
    ["scheduler=cosine", "seed=5"],
    ["optim=sgd", "optim.momentum=0.5", "+optim.nesterov=true"],
    ["optim={lr: 3, weight_decay: 0}"],
    ["dataloader.val.batch_size=3"],
    ["hydra.job.name=other", "steps=2"],
    ["hydra.run.dir=elsewhere"],
    ["hydra.sweep.subdir=${steps}"],
    ["steps=2", "steps=3"],
]
FAULTY = [
    ["parallel=fsdpx"],
    ["modle=small"],
    ["model=huge"],
    ["+model=large"],
    ["++model=large"],
    ["stepz=3"],
    ["workspace_root=null"],
    ["steps=three"],
    ["+steps=3"],
    ["~nothing"],
    ["~steps=99"],
    ["model@nowhere=large"],
    ["nogroup@there=x"],
    ["steps=1,2"],
    ["steps=[1"],
    ["model=3"],
    ["fsdp.enabled=perhaps", "parallel=fsdp8"],
    ["hydra.launcher.nothing=1"],
]
VALUES = ["steps=5", "seed=3", "optim.lr=0.5", "+data.x=[1,{y: z}]", "data.numbers=[]", "~data.numbers", "seed=null",
          "experiment='a b'", "lineage=${experiment}", "++data.x=1", "model.width=3"]  # fmt: skip
CHOICES = ["parallel=fsdp8", "parallel=single", "parallel=mine", "model=large", "compile=max", "+recipe=fast",
           "optim=sgd", "~model", "+model@data.m=small", "model=huge"]  # fmt: skip


@pytest.fixture(scope="module", params=["train", "plain"])
def sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    root = tmp_path_factory.mktemp("conf")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    with composer(ConfigSearch(config_name=request.param, config_path=str(root))) as composing:
        given = ["hydra/launcher=danling_slurm", "hydra.launcher.nodes=2", "hydra.launcher.comment=${experiment}"]
        master = composing.compose(given, multirun=True)
        yield composing, master, SweepComposer(composing, master)


def described(node: Node) -> Any:
    """A node with all that it is: type, value or content, flags, metadata."""
    flags = {name: node._get_node_flag(name) for name in ("struct", "readonly", "allow_objects")}
    meta = {name: value for name, value in vars(node._metadata).items() if name != "flags"}
    content: Any = node._value()
    if isinstance(node, DictConfig) and isinstance(content, dict):
        content = [(key, described(child)) for key, child in content.items()]
    elif isinstance(node, ListConfig) and isinstance(content, list):
        content = [described(child) for child in content]
    return type(node).__name__, flags, meta, content


def outcome(compose: Any, overrides: list[str]) -> Any:
    try:
        return described(compose(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return type(error), str(error), type(error.__cause__)


def check_same(composing: Composer, master: DictConfig, fast: SweepComposer, overrides: list[str]) -> Any:
    theirs = outcome(lambda given: composing.sweep_config(master, given), overrides)
    assert outcome(fast.compose, overrides) == theirs
    return theirs


@pytest.mark.parametrize("overrides", FAULTLESS, ids=" ".join)
def test_same_as_hydra(sweep: tuple[Any, ...], overrides: list[str]) -> None:
    assert check_same(*sweep, overrides)[0] == "DictConfig"


@pytest.mark.parametrize("overrides", FAULTY, ids=" ".join)
def test_refused_as_by_hydra(sweep: tuple[Any, ...], overrides: list[str]) -> None:
    assert check_same(*sweep, overrides)[0] != "DictConfig"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=st.lists(st.sampled_from(VALUES + CHOICES), max_size=6))
def test_any_mixture(sweep: tuple[Any, ...], overrides: list[str]) -> None:
    check_same(*sweep, overrides)


@pytest.mark.parametrize("overrides", FAULTLESS, ids=" ".join)
def test_a_job_with_its_number(sweep: tuple[Any, ...], overrides: list[str]) -> None:
    composing, master, fast = sweep
    config, plain, _ = fast.compose_job(overrides, 12)
    theirs = composing.sweep_config(master, overrides)
    theirs.hydra.job.update({"num": 12, "id": "12"})
    assert plain == hydra_settings(theirs, None)
    for one in (config, theirs):
        OmegaConf.set_struct(one, False)
        one.pop("hydra", None)
    assert described(config) == described(theirs)


def test_one_job_does_not_change_the_next(sweep: tuple[Any, ...]) -> None:
    composing, master, fast = sweep
    first = fast.compose(["+data.x={a: 1}", "data.numbers=[9]"])
    OmegaConf.update(first, "data.x.a", 5, force_add=True)
    first.data.numbers.append(4)
    first.hydra.job.name = "changed"
    for overrides in (["+data.x={a: 1}", "data.numbers=[9]"], []):
        check_same(composing, master, fast, overrides)


def test_groups_on_a_search_path_of_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "far" / "shape").mkdir(parents=True)
    (tmp_path / "far" / "shape" / "round.yaml").write_text("radius: 1\n")
    with composer(ConfigSearch(config_name="danling")) as composing:
        master = composing.compose([f"hydra.searchpath=[file://{tmp_path / 'far'}]"], multirun=True)
        check_same(composing, master, SweepComposer(composing, master), ["+shape=round", "steps=3"])
