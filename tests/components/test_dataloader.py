"""Data loaders: settings of splits, the same samples at any degree, exact resume."""

from __future__ import annotations

import itertools

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from danling_conf.components.dataloader import from_keywords, make, set_epoch, settings_for
from danling_conf.components.samplers import DROP, REPEAT, ShardedSampler, seed_of
from danling_conf.schema.dataloader import DataloaderConfig, SplitDataloaderConfig
from danling_conf.topology.violation import SettingError


class Numbers(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


class Noise(Numbers):
    def __getitem__(self, index):
        return torch.rand(())


class Stream(IterableDataset):
    def __init__(self, numbers):
        self.numbers = numbers

    def __iter__(self):
        return iter(self.numbers)


class Shardable(Stream):
    def shard(self, num_shards, index):
        return Shardable(self.numbers[index::num_shards])


def section(**settings):
    splits = {key: settings.pop(key) for key in ("train", "val") if key in settings}
    made = DataloaderConfig(**settings)
    for split, own in splits.items():
        setattr(made, split, own)
    return made


def batches(loader, epoch=None):
    if epoch is not None:
        set_epoch(loader, epoch)
    return [batch.tolist() for batch in loader]


# Settings


def test_a_training_split_shuffles_and_drops_and_others_do_not():
    for split, expected in (("train", True), ("train_clean", True), ("val", False), ("test", False)):
        settings = settings_for(section(), split)
        assert (settings.shuffle, settings.drop_last) == (expected, expected)


def test_a_split_overrides_what_all_splits_share():
    shared = section(batch_size=4, shuffle=False, val={"batch_size": 2, "drop_last": True})
    assert settings_for(shared, "val") == SplitDataloaderConfig(batch_size=2, shuffle=False, drop_last=True)
    assert settings_for(shared, "train") == SplitDataloaderConfig(batch_size=4, shuffle=False, drop_last=True)
    typed = section(batch_size=4, val=SplitDataloaderConfig(shuffle=True))
    assert settings_for(typed, "val") == SplitDataloaderConfig(batch_size=4, shuffle=True, drop_last=False)


def test_unset_options_are_left_to_torch():
    ours, theirs = make(Numbers(8), section(), "val"), StatefulDataLoader(Numbers(8))
    names = ("batch_size", "num_workers", "persistent_workers", "prefetch_factor", "pin_memory", "in_order")
    for name in (*names, "snapshot_every_n_steps", "drop_last"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_options_arrive_at_the_loader():
    options = {"batch_size": 3, "num_workers": 1, "persistent_workers": True, "prefetch_factor": 4, "in_order": False}
    loader = make(Numbers(8), section(**options, snapshot_every_n_steps=5, drop_last=True), "val", collate_fn=tuple)
    for name, value in (options | {"snapshot_every_n_steps": 5, "drop_last": True, "collate_fn": tuple}).items():
        assert getattr(loader, name) == value


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prefetch_factor": 2}, r"dataloader.prefetch_factor=2\n.* set dataloader.num_workers=2"),
        ({"persistent_workers": True}, r"dataloader.persistent_workers=true"),
        ({"val": {"prefetch_factor": 2}}, r"dataloader.val.prefetch_factor=2\n.* set dataloader.val.num_workers=2"),
        ({"num_workers": 2, "val": {"num_workers": 0, "prefetch_factor": 2}}, r"dataloader.val.prefetch_factor=2"),
        ({"val": {"batchsize": 2}}, r"dataloader.val.batchsize=2\n.*mean batch_size"),
        ({"val": 3}, r"dataloader.val=3\n +it must be a mapping"),
    ],
)
def test_faults_of_settings_say_where_what_and_how_to_fix(settings, said):
    with pytest.raises(ValueError, match="(?s)" + said):
        settings_for(section(**settings), "val")


def test_splits_without_workers_leave_what_the_only_one_with_workers_is_given():
    shared = section(persistent_workers=True, prefetch_factor=3, val={"num_workers": 2})
    train, val = settings_for(shared, "train"), settings_for(shared, "val")
    assert (train.prefetch_factor, train.persistent_workers) == (None, None)
    assert (val.prefetch_factor, val.persistent_workers) == (3, True)


def test_a_split_without_workers_leaves_what_splits_with_workers_share():
    shared = section(num_workers=2, prefetch_factor=3, persistent_workers=True, val={"num_workers": 0})
    settings = settings_for(shared, "val")
    assert (settings.prefetch_factor, settings.persistent_workers) == (None, None)
    assert settings_for(shared, "train").prefetch_factor == 3
    make(Numbers(4), shared, "val")


@pytest.mark.parametrize(("size", "degree", "drop"), [(7, 2, True), (3, 1, True), (0, 1, False)])
def test_a_training_split_without_a_batch_is_refused(size, degree, drop):
    message = rf"dataloader.batch_size=4\n +the {size} samples of split train make no batch"
    with pytest.raises(ValueError, match=message):
        make(Numbers(size), section(batch_size=4, drop_last=drop), "train", data_degree=degree)


# Samples


@pytest.mark.parametrize("size", [24, 29])
def test_the_ranks_together_take_the_batches_of_a_single_process(size):
    single = make(Numbers(size), section(batch_size=6), "train", seed=3)
    ranks = [make(Numbers(size), section(batch_size=2), "train", seed=3, data_rank=r, data_degree=3) for r in range(3)]
    orders = []
    for epoch in range(2):
        expected = batches(single, epoch)
        shares = [batches(loader, epoch) for loader in ranks]
        assert len(expected) == len(shares[0]) == size // 6
        for whole, parts in zip(expected, zip(*shares, strict=True), strict=True):
            assert set(whole) == set(itertools.chain(*parts))
        orders.append(expected)
    assert orders[0] != orders[1]


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    first, again, other = (batches(make(Numbers(20), section(), "train", seed=seed), 1) for seed in (5, 5, 7))
    assert first == again != other


@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("remainder", "drop"), [(DROP, True), (REPEAT, False)])
def test_the_order_is_that_of_torch(degree, shuffle, remainder, drop):
    for size, epoch, rank in itertools.product((2, 9, 11), (0, 2), range(degree)):
        if drop and size < degree:
            continue
        theirs = DistributedSampler(range(size), degree, rank, shuffle=shuffle, seed=4, drop_last=drop)
        ours = ShardedSampler(size, rank=rank, degree=degree, shuffle=shuffle, seed=4, remainder=remainder)
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)
        assert len(ours) == len(theirs)


def test_without_drop_last_ranks_have_equally_many_training_batches():
    shared = section(batch_size=2, drop_last=False)
    shares = [batches(make(Numbers(9), shared, "train", data_rank=r, data_degree=4)) for r in range(4)]
    assert {len(share) for share in shares} == {2}
    assert set(itertools.chain(*itertools.chain(*shares))) == set(range(9))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("shuffle", [True, False])
def test_evaluation_sees_every_sample_once(size, shuffle):
    shared = section(batch_size=2, shuffle=shuffle)
    loaders = [make(Numbers(size), shared, "val", data_rank=rank, data_degree=4) for rank in range(4)]
    shares = [batches(loader, 1) for loader in loaders]
    assert sorted(itertools.chain(*itertools.chain(*shares))) == list(range(size))
    assert [len(share) for share in shares] == [len(loader) for loader in loaders]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("size", "degree"), [(3, 1), (7, 2), (0, 1)])
def test_a_held_out_split_without_a_whole_batch_is_refused(size, degree):
    why = rf"drop_last=true\n +the {size} samples of split val make no whole batch of 4 on each of {degree} ranks\n"
    for own, path in (({"drop_last": True}, "dataloader.val"), ({}, "dataloader")):
        shared = section(batch_size=4, drop_last=True if not own else None, val=own)
        with pytest.raises(ValueError, match=rf"^{path}\.{why} +fix: set dataloader\.val\.drop_last=false"):
            make(Numbers(size), shared, "val", data_degree=degree)
        # One more sample is nobody's: ranks have as many batches as each other.
        shares = [make(Numbers(4 * degree + 1), shared, "val", data_rank=r, data_degree=degree) for r in range(degree)]
        assert [len(share) for share in shares] == [1] * degree


def test_iterable_data_sets_deal_themselves_out():
    shares = [batches(make(Shardable(range(8)), section(), "train", data_rank=r, data_degree=2)) for r in range(2)]
    assert shares == [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]
    assert batches(make(Stream(range(5)), section(batch_size=2), "train")) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match=r"(?s)split train\n.*each of the 2 data ranks would see all .*`shard"):
        make(Stream(range(5)), section(), "train", data_degree=2)
    with pytest.raises(ValueError, match=r"dataloader.train.shuffle=true\n +an iterable"):
        make(Stream(range(5)), section(train={"shuffle": True}), "train")


def test_data_sets_that_cannot_be_loaded_from_are_refused():
    class Endless(Dataset):
        def __getitem__(self, index):
            return index

    with pytest.raises(SettingError, match="has no length"):
        make(Endless(), section(), "val")
    with pytest.raises(SettingError, match="neither samples by index nor"):
        make({1, 2}, section(), "val")


# Resume


def saved(loader, path):
    torch.save(loader.state_dict(), path)
    return torch.load(path, weights_only=True)


WORKERS = [
    pytest.param({"num_workers": 0}, id="0"),
    pytest.param({"num_workers": 2}, id="2", marks=pytest.mark.slow),
    pytest.param({"num_workers": 2, "persistent_workers": True}, id="persistent", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("taken", [0, 3, 6])
def test_a_loader_goes_on_exactly_from_its_state(workers, epoch, taken, tmp_path):
    def fresh():
        return make(Numbers(26), section(batch_size=2, **workers), "train", seed=9, data_rank=1, data_degree=2)

    loader = fresh()
    for earlier in range(epoch):
        batches(loader, earlier)
    set_epoch(loader, epoch)
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    state = saved(loader, tmp_path / "state.pt")
    if taken == 6:  # the epoch is over
        assert list(iterator) == []
        state = saved(loader, tmp_path / "state.pt")
        rest = batches(loader, epoch + 1)
    else:
        rest = [batch.tolist() for batch in iterator]
    following = batches(loader, epoch + 2)
    resumed = fresh()
    set_epoch(resumed, epoch + (taken == 6))
    resumed.load_state_dict(state)
    assert rest
    assert batches(resumed) == rest
    assert batches(resumed, epoch + 2) == following


def test_a_state_restores_its_epoch_without_being_told():
    loader = make(Numbers(20), section(), "train")
    set_epoch(loader, 4)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    resumed = make(Numbers(20), section(), "train")
    resumed.load_state_dict(state)
    assert batches(resumed) == [batch.tolist() for batch in iterator]


def test_a_state_fits_another_degree_with_the_same_global_batch():
    def fresh(degree, rank):
        return make(Numbers(24), section(batch_size=4 // degree), "train", data_rank=rank, data_degree=degree)

    iterators = []
    for rank in range(2):
        loader = fresh(2, rank)
        iterators.append(iter(loader))
        next(iterators[-1]), next(iterators[-1])
        state = loader.state_dict()
    rest = [set(itertools.chain(*(part.tolist() for part in parts))) for parts in zip(*iterators, strict=True)]
    for degree in (1, 4):
        resumed = [fresh(degree, rank) for rank in range(degree)]
        for loader in resumed:
            loader.load_state_dict(state)
        shares = [batches(loader) for loader in resumed]
        assert [set(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == rest


# Random numbers


@pytest.mark.slow
def test_workers_draw_other_numbers_on_each_rank_and_epoch_and_the_same_in_each_run():
    def drawn(rank, epoch, seed=1):
        loader = make(Noise(8), section(num_workers=2), "train", seed=seed, data_rank=rank, data_degree=2)
        return str(batches(loader, epoch))

    assert drawn(0, 0) == drawn(0, 0)
    assert len({drawn(0, 0), drawn(1, 0), drawn(0, 1), drawn(0, 0, seed=2)}) == 4


def test_iterating_leaves_the_generator_of_the_process_alone():
    before = torch.random.get_rng_state()
    batches(make(Numbers(8), section(), "train"), 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_seeds_of_neighbours_differ():
    seeds = {seed_of(*parts) for parts in itertools.product(range(8), range(8), range(8))}
    assert len(seeds) == 512


def test_from_keywords_takes_what_hydra_passes():
    waiting = from_keywords(batch_size=2, val=OmegaConf.create({"batch_size": 3}))
    assert batches(waiting(Numbers(6), split="val")) == [[0, 1, 2], [3, 4, 5]]
