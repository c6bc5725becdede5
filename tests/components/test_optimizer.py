"""Optimizers: groups by pattern, options, and Muon for a whole model, alone and sharded."""

from __future__ import annotations

import copy
import multiprocessing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from danling_conf.components.muon import MuonAdamW
from danling_conf.components.optimizer import from_keywords, make
from danling_conf.schema.optim import OptimConfig
from danling_conf.topology.violation import ConfigRefused, SettingError


def section(**settings):
    declared = {key: settings.pop(key) for key in ("type", "lr", "weight_decay", "param_groups") if key in settings}
    made = OptimConfig(**declared)
    for key, value in settings.items():
        setattr(made, key, value)
    return made


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, head="lm_head", tied=False):
        super().__init__()
        self.tok_embeddings = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        setattr(self, head, nn.Linear(6, 11, bias=False))
        if tied:
            getattr(self, head).weight = self.tok_embeddings.weight
        self.head_name = head

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for block in self.blocks:
            x = block(x)
        return getattr(self, self.head_name)(x)


def model(**settings):
    torch.manual_seed(0)
    return Model(**settings)


def train(module, optimizer, steps=3, seed=1, scheduler=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, 11, (4, 5), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def names_of(module, group):
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    return {by_id[id(parameter)] for parameter in group["params"]}


def assert_same_weights(one, other, tolerance=0.0):
    for (name, left), (_, right) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance, msg=name)


def test_trains_as_torch_does_with_the_same_options():
    ours, theirs = model(), model()
    train(ours, make(ours, section(type="AdamW", lr=0.01, betas=[0.8, 0.9], weight_decay=0.2, amsgrad=True)))
    train(theirs, torch.optim.AdamW(theirs.parameters(), 0.01, betas=(0.8, 0.9), weight_decay=0.2, amsgrad=True))
    assert_same_weights(ours, theirs)


def test_unset_options_are_left_to_torch():
    optimizer = make(model(), section(type="rmsprop", lr=None))
    assert optimizer.defaults == torch.optim.RMSprop(model().parameters()).defaults
    assert make(model(), section(type="adamw", betas=[0.8, 0.9])).defaults["betas"] == (0.8, 0.9)


def test_the_first_pattern_that_matches_takes_the_parameter_and_the_rest_is_group_zero():
    module = model()
    groups = [
        {"pattern": r"norm|bias$", "weight_decay": 0.0},
        {"pattern": r"blocks\.1\.", "lr_multiplier": 0.5, "weight_decay_multiplier": 2},
    ]
    built = make(module, section(type="adamw", lr=0.01, param_groups=groups)).param_groups
    assert [group["name"] for group in built] == ["default", r"norm|bias$", r"blocks\.1\."]
    assert names_of(module, built[0]) == {
        "tok_embeddings.weight", "blocks.0.up.weight", "blocks.0.down.weight", "lm_head.weight",
    }  # fmt: skip
    assert names_of(module, built[2]) == {"blocks.1.up.weight", "blocks.1.down.weight"}
    assert [group["weight_decay"] for group in built] == [0.01, 0.0, 0.02]
    assert [group["lr"] for group in built] == [0.01, 0.01, 0.005]


def test_multipliers_are_relative_to_the_section_and_single_betas_replace_entries():
    groups = [{"pattern": "norm", "weight_decay_multiplier": 0.5, "beta2": 0.7}, {"pattern": "bias", "beta1": 0.6}]
    built = make(model(), section(weight_decay=0.4, betas=[0.8, 0.9], param_groups=groups)).param_groups
    assert [group["weight_decay"] for group in built] == [0.4, 0.2, 0.4]
    assert [group["betas"] for group in built] == [(0.8, 0.9), (0.8, 0.7), (0.6, 0.9)]


def test_frozen_and_shared_parameters():
    module = model(tied=True)
    module.blocks[0].requires_grad_(False)
    (group,) = make(module.named_parameters(remove_duplicate=False), section()).param_groups
    assert len(group["params"]) == len({id(item) for item in group["params"]})
    assert not any("blocks.0" in name for name in names_of(module, group))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_not_part_of_names(prefix):
    named = [
        (prefix + name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."), parameter)
        for name, parameter in model().named_parameters()
    ]
    groups = [{"pattern": r"^blocks\.0\.norm\.weight$", "lr": 0.5}]
    assert make(named, section(param_groups=groups)).param_groups[1]["lr"] == 0.5


def test_a_submodule_called_module_keeps_its_name():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.other = nn.Linear(2, 2), nn.Linear(2, 2)

    make(Outer(), section(param_groups=[{"pattern": r"^module\."}]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "adamww"}, r"optim.type=adamww.*mean AdamW"),
        ({"type": "adamw", "momentum": 0.9}, r"optim.momentum=0.9\n +AdamW has no such option"),
        ({"type": "adamw", "betas": [0.9, 1.5]}, r"optim\n +AdamW refuses its options.*beta"),
        ({"param_groups": [{"pattern": "blocs"}]}, r"param_groups\[0\].pattern=blocs\n +it matches no.*blocks"),
        ({"param_groups": [{"pattern": "["}]}, r"param_groups\[0\].pattern=\[\n +it is not a regular expression"),
        ({"param_groups": [{"pattern": "norm"}, {"pattern": "norm.bias"}]}, r"\[1\].pattern.*earlier groups"),
        ({"param_groups": [{"pattern": "norm", "lr": 1.0, "lr_multiplier": 2.0}]}, r"\[0\].lr_multiplier=2.0"),
        ({"param_groups": ["norm"]}, r"param_groups\[0\]=norm\n +it must be a mapping"),
        ({"type": "lbfgs", "param_groups": [{"pattern": "norm"}]}, r"LBFGS has a single parameter group"),
        ({"type": "no_such_package.Lion"}, r"optim.type=no_such_package.Lion\n +it cannot be imported"),
    ],
)
def test_faults_say_where_what_and_how_to_fix(settings, said):
    with pytest.raises(ValueError, match="(?s)" + said):
        make(model(), section(**settings))


def test_a_pattern_of_frozen_parameters_is_told_apart():
    module = model()
    module.blocks.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen parameters only"):
        make(module, section(param_groups=[{"pattern": "blocks"}]))
    with pytest.raises(ValueError, match=r"no parameter that requires a gradient"):
        make(module.blocks, section())


def test_a_part_of_a_model_may_lack_what_the_whole_has():
    whole = model()
    part = [(f"blocks.1.{name}", item) for name, item in whole.blocks[1].named_parameters()]
    groups = [{"pattern": "embeddings", "lr": 0.1}, {"pattern": "norm", "lr": 0.2}]
    built = make(part, section(param_groups=groups), whole=whole).param_groups
    assert [group["name"] for group in built] == ["default", "norm"]
    with pytest.raises(ValueError, match="matches no parameter"):
        make(part, section(param_groups=groups))


class Own(torch.optim.SGD):
    def __init__(self, params, lr=0.1, nudge=0.5):
        super().__init__(params, lr=lr)
        self.defaults["nudge"] = self.nudge = nudge


def test_an_own_class_gets_its_options():
    path = f"{Own.__module__}.Own"
    optimizer = make(model(), section(type=path, nudge=0.25, param_groups=[{"pattern": "norm", "lr_multiplier": 2}]))
    assert type(optimizer).__name__ == "Own"
    assert optimizer.nudge == 0.25
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.002)
    with pytest.raises(ValueError, match="unexpected keyword argument 'nugde'"):
        make(model(), section(type=path, nugde=0.25))
    with pytest.raises(ValueError, match=r"optim.param_groups\[0\].nugde=1\n +Own has no such option\n.*mean nudge"):
        make(model(), section(type=path, param_groups=[{"pattern": "norm", "nugde": 1}]))
    with pytest.raises(SettingError, match="not a subclass of Optimizer"):
        make(model(), section(type=f"{Own.__module__}.Model"))


def test_from_keywords_takes_what_hydra_passes():
    groups = OmegaConf.create([{"pattern": "norm", "betas": [0.5, 0.6]}])
    waiting = from_keywords(type="adamw", lr=0.5, betas=OmegaConf.create([0.8, 0.9]), param_groups=groups)
    built = waiting(model()).param_groups
    assert [group["betas"] for group in built] == [(0.8, 0.9), (0.5, 0.6)]


# Muon


def algorithm_of(module, optimizer):
    return {name: group["algorithm"] for group in optimizer.param_groups for name in names_of(module, group)}


HIDDEN = {f"blocks.{number}.{name}.weight" for number in (0, 1) for name in ("up", "down")}


@pytest.mark.parametrize("settings", [{}, {"head": "to_words"}, {"tied": True}, {"head": "to_words", "tied": True}])
def test_muon_takes_the_hidden_matrices(settings):
    module = model(**settings)
    algorithms = algorithm_of(module, make(module, section(type="muon")))
    assert {name for name, algorithm in algorithms.items() if algorithm == "muon"} == HIDDEN
    by_name_only = make(model().named_parameters(), section(type="muon"))
    assert sum(len(group["params"]) for group in by_name_only.param_groups if group["algorithm"] == "muon") == 4


def test_muon_leaves_the_last_matrix_of_a_model_without_a_named_head_to_adamw():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    algorithms = algorithm_of(module, make(module, section(type="muon")))
    assert {name for name, algorithm in algorithms.items() if algorithm == "muon"} == {"0.weight", "2.weight"}


def test_muon_and_adamw_train_as_the_two_of_torch_do():
    ours, theirs = model(), model()
    train(ours, make(ours, section(type="muon", lr=0.02, weight_decay=0.1, betas=[0.9, 0.95])))
    matrices = [item for name, item in theirs.named_parameters() if name in HIDDEN]
    others = [item for name, item in theirs.named_parameters() if name not in HIDDEN]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))

    class Both:
        def zero_grad(self):
            muon.zero_grad(), adamw.zero_grad()

        def step(self):
            muon.step(), adamw.step()

    train(theirs, Both())
    assert_same_weights(ours, theirs)


def test_groups_of_muon_choose_algorithms_and_options():
    module = model()
    groups = [
        {"pattern": r"blocks\.0\.up\.weight", "algorithm": "adamw", "eps": 1e-6, "beta1": 0.5},
        {"pattern": r"blocks\.1", "lr_multiplier": 0.5, "ns_steps": 3},
    ]
    optimizer = make(module, section(type="muon", lr=0.1, adamw_lr_multiplier=0.25, param_groups=groups))
    seen = {(group["name"], group["algorithm"]): group for group in optimizer.param_groups}
    assert set(seen) == {
        ("default", "muon"), ("default", "adamw"), (r"blocks\.0\.up\.weight", "adamw"),
        (r"blocks\.1", "muon"), (r"blocks\.1", "adamw"),
    }  # fmt: skip
    assert seen["default", "adamw"]["lr"] == pytest.approx(0.025)
    assert seen[r"blocks\.1", "muon"]["lr"] == pytest.approx(0.05)
    assert seen[r"blocks\.1", "adamw"]["lr"] == pytest.approx(0.0125)
    assert seen[r"blocks\.1", "muon"]["ns_steps"] == 3
    assert seen[r"blocks\.0\.up\.weight", "adamw"]["eps"] == 1e-6
    assert seen[r"blocks\.0\.up\.weight", "adamw"]["betas"] == (0.5, 0.999)
    assert seen["default", "adamw"]["weight_decay"] == 0.01
    assert seen["default", "muon"]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"pattern": "norm", "algorithm": "muon"}, r"algorithm=muon\n +Muon takes matrices only, .*1 dimensions"),
        ({"pattern": "norm", "momentum": 0.9}, r"\[0\].momentum=0.9\n +every parameter .* by AdamW"),
        ({"pattern": "down", "betas": [0.9, 0.9]}, r"\[0\].betas=.*\n +every parameter .* by Muon"),
        ({"pattern": "down", "beta1": 0.9}, r"\[0\].beta1=0.9\n +every parameter .* by Muon"),
    ],
)
def test_groups_of_muon_without_effect_are_refused(group, said):
    with pytest.raises(ValueError, match="(?s)" + said):
        make(model(), section(type="muon", param_groups=[group]))


def test_muon_steps_with_a_closure_and_a_scheduler_moves_both_learning_rates():
    module = model()
    optimizer = make(module, section(type="muon", lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []

    def closure():
        calls.append(0)
        optimizer.zero_grad()
        loss = module(torch.arange(6)[None]).square().mean()
        loss.backward()
        return loss

    before = copy.deepcopy(module)
    assert optimizer.step(closure) > 0
    scheduler.step()
    assert len(calls) == 1
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
    changed = [not torch.equal(a, b) for a, b in zip(module.parameters(), before.parameters(), strict=True)]
    assert all(changed)


def test_muon_goes_on_exactly_from_its_state_dict(tmp_path):
    straight = model()
    train(straight, make(straight, section(type="muon")), steps=3)
    train_on = copy.deepcopy(straight)
    first = make(straight, section(type="muon"))
    train(straight, first, steps=2)
    half = copy.deepcopy(straight)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    train(straight, first, steps=2, seed=5)
    second = make(half, section(type="muon", lr=0.7))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(half, second, steps=2, seed=5)
    assert_same_weights(straight, half)
    with pytest.raises(AssertionError):
        assert_same_weights(straight, train_on)


@pytest.mark.parametrize("flatten", [False, True])
def test_muon_goes_on_exactly_from_a_distributed_state_dict(flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    one = model()
    first = make(one, section(type="muon"))
    train(one, first, steps=2)
    state = copy.deepcopy(get_optimizer_state_dict(one, first, options=options))
    two = copy.deepcopy(one)
    train(one, first, steps=2, seed=5)
    second = make(two, section(type="muon", lr=0.7))
    set_optimizer_state_dict(two, second, state, options=options)
    train(two, second, steps=2, seed=5)
    assert_same_weights(one, two)


def test_a_pair_needs_to_be_told_the_algorithm():
    with pytest.raises(ValueError, match="needs an `algorithm`"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(2, 2))]}])


def wait_for(world_size, function, path):
    """Run `function(rank, world_size)` in gloo processes of its own; each puts what it returns in rank order."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def body(rank):
        torch.set_num_threads(1)
        store = dist.FileStore(str(path / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        try:
            queue.put((rank, function(rank, world_size)))
        finally:
            dist.destroy_process_group()

    processes = [context.Process(target=body, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=90) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def whole_weights(module):
    return {
        name: (item.full_tensor() if hasattr(item, "full_tensor") else item).detach().tolist()
        for name, item in module.named_parameters()
    }


def sharded_training(rank, world_size):
    module = model()
    mesh = init_device_mesh("cpu", (world_size,))
    for block in module.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = make(module, section(type="muon", lr=0.02))
    train(module, optimizer, steps=2)
    state = copy.deepcopy(get_optimizer_state_dict(module, optimizer))
    again = make(module, section(type="muon", lr=0.5))
    set_optimizer_state_dict(module, again, state)
    train(module, again, steps=2, seed=5)
    return whole_weights(module), algorithm_of(module, again)


def tensor_parallel_training(rank, world_size):
    module = model()
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("shard", "tensor"))
    for block in module.blocks:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(module, mesh=mesh["shard"])
    optimizer = make(module, section(type="muon", lr=0.02, foreach=False))
    train(module, optimizer, steps=2)
    train(module, optimizer, steps=2, seed=5)
    return whole_weights(module), algorithm_of(module, optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "training"), [(2, sharded_training), (4, tensor_parallel_training)])
def test_sharded_muon_trains_as_a_single_process_does(world_size, training, tmp_path):
    single = model()
    optimizer = make(single, section(type="muon", lr=0.02))
    train(single, optimizer, steps=2)
    train(single, optimizer, steps=2, seed=5)
    expected = whole_weights(single)
    for weights, algorithms in wait_for(world_size, training, tmp_path):
        assert algorithms == algorithm_of(single, optimizer)
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(value), rtol=0, atol=2e-5, msg=name)


def test_all_faults_of_groups_are_reported_at_once():
    groups = [{"pattern": "nowhere"}, {"pattern": "norm"}, {"pattern": "neither"}]
    with pytest.raises(ConfigRefused) as refused:
        make(model(), section(param_groups=groups))
    assert [item.path for item in refused.value.violations] == [
        "optim.param_groups[0].pattern",
        "optim.param_groups[2].pattern",
    ]
    with pytest.raises(SettingError) as alone:
        make(model(), section(param_groups=groups[:2]))
    assert alone.value.violation == refused.value.violations[0]
