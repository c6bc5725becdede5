"""What replica groups exchange, piece by piece; tests/launch/test_groups.py has whole runs."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from danling_conf.parallel import weights_transport
from danling_conf.parallel.outer import Outer
from danling_conf.parallel.weights_transport import WeightsTransport
from danling_conf.schema.fault_tolerance import FtConfig

LIMIT = timedelta(seconds=10)


@pytest.fixture
def transports():
    made = [WeightsTransport("127.0.0.1") for _ in range(2)]
    yield made
    for each in made:
        each.shutdown()


def test_a_state_arrives_as_it_was_when_it_was_sent(transports):
    source, target = transports
    weights = torch.arange(6.0)
    source.send_checkpoint([1], 7, {"user": {"w": weights, "python": (3, (1, 2), None)}, "torchft": {"step": 7}}, LIMIT)
    weights.zero_()  # training goes on
    found = target.recv_checkpoint(0, source.metadata(), 7, LIMIT)
    assert torch.equal(found["user"]["w"], torch.arange(6.0))
    assert found["user"]["python"] == (3, (1, 2), None)
    source.disallow_checkpoint()
    assert source.served(f"/{source.metadata().rpartition('/')[2]}/7") is None  # nobody waits for it: it is forgotten


def test_a_state_may_be_asked_for_before_it_is_there(transports):
    source, target = transports
    threading.Timer(0.3, source.send_checkpoint, ([1], 2, {"w": torch.ones(1)}, LIMIT)).start()
    assert torch.equal(target.recv_checkpoint(0, source.metadata(), 2, LIMIT)["w"], torch.ones(1))


def test_a_state_is_given_to_nobody_who_does_not_know_the_secret(transports, monkeypatch):
    source, target = transports
    monkeypatch.setattr(weights_transport, "_WAIT_SECONDS", 0.1)
    source.send_checkpoint([1], 7, {"w": torch.ones(1)}, LIMIT)
    place = source.metadata().partition("/")[0]
    for metadata, step in ((f"{place}/{'0' * 32}", 7), (source.metadata(), 8)):
        with pytest.raises(ConnectionError, match="404"):
            target.recv_checkpoint(0, metadata, step, LIMIT)


class Harmful:
    """Code that a pickle would run."""

    def __reduce__(self) -> Any:
        return print, ("harm",)


def test_a_state_is_loaded_without_code(transports, capsys):
    source, target = transports
    source.send_checkpoint([1], 7, {"w": Harmful()}, LIMIT)
    with pytest.raises(Exception, match=r"Weights only load failed"):
        target.recv_checkpoint(0, source.metadata(), 7, LIMIT)
    assert "harm" not in capsys.readouterr().out


def groups_of(sync: str, **settings: Any) -> list[tuple[nn.Parameter, Outer]]:
    """Two groups with one parameter each, which begin alike."""
    section = FtConfig(sync=sync, **settings)
    parameters = [nn.Parameter(torch.tensor([1.0, -2.0, 0.5])) for _ in range(2)]
    return [(item, Outer(section, [item], [torch.zeros(3)])) for item in parameters]


def agree(groups: list[tuple[nn.Parameter, Outer]], changes: list[torch.Tensor], *, committed: bool = True) -> None:
    """Train each group on its own, and let them agree."""
    for (parameter, outer), change in zip(groups, changes, strict=True):
        outer.begin()
        with torch.no_grad():
            parameter += change
    with torch.no_grad():
        proposed = [outer.proposed() for _, outer in groups]
        mean = torch.stack([item[0] for item in proposed]).mean(0)
        for item in proposed:
            item[0].copy_(mean)
        for _, outer in groups:
            outer.end(committed=committed)


def test_local_sgd_takes_the_mean_of_the_weights():
    groups = groups_of("local_sgd")
    agree(groups, [torch.tensor([0.5, 0.0, 1.0]), torch.tensor([-0.5, 1.0, 0.0])])
    for parameter, _ in groups:
        torch.testing.assert_close(parameter.detach(), torch.tensor([1.0, -1.5, 1.0]))


def test_diloco_is_nesterov_on_the_mean_change():
    groups = groups_of("diloco", outer_lr=0.7, outer_momentum=0.9)
    reference = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    outer = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        changes = [torch.randn(3, generator=generator) for _ in groups]
        agree(groups, changes)
        reference.grad = -torch.stack(changes).mean(0)
        outer.step()
        for parameter, _ in groups:
            torch.testing.assert_close(parameter, reference)


def test_what_was_not_agreed_on_changes_nothing():
    groups = groups_of("diloco")
    agree(groups, [torch.ones(3), 2 * torch.ones(3)], committed=False)
    torch.testing.assert_close(groups[1][0].detach(), torch.tensor([3.0, 0.0, 2.5]))
