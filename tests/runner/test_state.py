"""The state of a run: what is saved of it, and what a runner has before it is prepared."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest

from danling_conf.checkpoint.fit import ModelDiffers, OptimizerDiffers
from danling_conf.checkpoint.loading import LayoutDiffers
from danling_conf.parallel.waiting import waiting, waits_for
from danling_conf.runner.state import TrainState
from danling_conf.runner.training import NotPrepared
from tests.support.small import Net, Pairs, loss, runner


def test_a_state_that_is_loaded_is_the_one_that_was_saved() -> None:
    saved = TrainState(step=7, epoch=2, epoch_step=1, results={"val.loss": 0.5}, evaluated_at={"val": 6}, first_step=5)
    loaded = TrainState(stopped_early=True)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.state_dict() == saved.state_dict()
    assert loaded.saved_at == 7
    assert (loaded.first_step, loaded.stopped_early) == (1, True)  # of this attempt
    loaded.results["val.loss"] = 0.0
    assert saved.results == {"val.loss": 0.5}


def test_what_was_excluded_from_loading_starts_anew() -> None:
    loaded = TrainState(step=3, results={"val.loss": 1.0})
    loaded.load_state_dict({"epoch": 4})
    assert loaded.state_dict() == TrainState(epoch=4).state_dict()


def test_what_a_runner_has_before_it_is_prepared(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    late = ("model", "optimizer", "scheduler", "loaders", "score", "cadence", "setup", "checkpoints", "display", "loop")
    try:
        assert (ours.global_step, ours.epoch, ours.results) == (0, 0, {})
        assert ours.world.ranks.world_size == 1
        for name in late:
            with pytest.raises(NotPrepared, match=r"Runner\.prepare"):
                getattr(ours, name)
        ours.prepare(Net, {"train": Pairs()}, loss=loss)
        for name in late:
            getattr(ours, name)
        assert ours.scheduler is ours.setup.schedule.scheduler
    finally:
        ours.close()


@pytest.mark.parametrize(
    "error",
    [
        LayoutDiffers(Path("a"), "ddp2", "fsdp2"),
        OptimizerDiffers(Path("a"), "AdamW", "SGD"),
        ModelDiffers(Path("a"), "it lacks first.weight"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_loading_reaches_other_ranks_with_its_data(error: Exception) -> None:
    received = pickle.loads(pickle.dumps(error))
    assert type(received) is type(error)
    assert (str(received), vars(received)) == (str(error), vars(error))


def test_a_rank_waits_only_inside_of_the_marked_block() -> None:
    here = threading.get_ident()

    def wait_in_vain() -> None:
        with waiting("the gradients"):
            assert waits_for(here) == "the gradients"
            raise RuntimeError("timed out")

    with pytest.raises(RuntimeError, match="timed out"):
        wait_in_vain()
    assert waits_for(here) is None
