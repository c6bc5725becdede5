"""Replica groups in a run: what a group that joins takes over, and what groups agree on before a step counts.

Everything that goes on with a step (optimizer, schedule, loader, losses, the step's number) waits for the vote on it. A
step that is refused is repeated with the same batches.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from danling_conf.checkpoint import state as flat
from danling_conf.checkpoint.state import Known
from danling_conf.components import dataloader
from danling_conf.components.samplers import ShardedSampler
from danling_conf.parallel.outer import Outer
from danling_conf.parallel.process_group import gathered, is_distributed, refuse_together
from danling_conf.parallel.replica_groups import NoQuorum, ReplicaGroup, address_of, local
from danling_conf.parallel.waiting import waiting
from danling_conf.records.membership import Event
from danling_conf.records.status import EXIT_FAILED, HasOutcome, Outcome, Status
from danling_conf.runner.callbacks import PREFIX, Callback, Callbacks, TrainingRun
from danling_conf.runner.leading import Lead
from danling_conf.runner.setup import Setup
from danling_conf.runner.signals import END_REQUESTED, StopRequest
from danling_conf.runner.state import TrainState
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.schema.fault_tolerance import DDP, DILOCO, LIGHTHOUSE_VARIABLE
from danling_conf.topology.rendezvous import listen
from danling_conf.topology.violation import PlainError, Violation

_ALONE_SECONDS = 3.0
"""How long a group that is asked to stop waits for the others to be asked too, as one command asks them all."""


class TooFewGroups(HasOutcome, PlainError):
    """There were too few replica groups for as long as a group waits. Raised after everything is saved."""

    @property
    def outcome(self) -> Outcome:
        return Outcome(status=Status.FAILED, exit_code=EXIT_FAILED, message=str(self))


class OuterMomentum(Callback):
    """Momentum of the outer optimizer of `diloco`: a callback, since checkpoints, runs that are resumed and groups that
    join take over the tensors of callbacks."""

    name = "diloco"

    def __init__(self) -> None:
        self._momentum: dict[str, Tensor] = {}

    def setup(self, runner: TrainingRun) -> None:
        trained = {name: item for name, item in flat.named_parameters(runner.parts) if item.requires_grad}
        self._momentum = {name: torch.zeros_like(item) for name, item in trained.items()}

    def tensors(self) -> Mapping[str, Tensor]:
        return self._momentum


def callbacks_of_groups(config: RunnerConfig) -> list[Callback]:
    """What replica groups add to the callbacks of a run."""
    return [OuterMomentum()] if config.ft.enabled and config.ft.sync == DILOCO else []


class Replicas:
    """This group's side of training in replica groups. All of it is collective in the group.

    Args:
        state: of the run; set to another group's where this one has to catch up.
        lead: notes what happens.
        stop_request: knows of signals.
    """

    def __init__(
        self,
        config: RunnerConfig,
        world: World,
        state: TrainState,
        setup: Setup,
        callbacks: Callbacks,
        lead: Lead,
        stop_request: StopRequest,
    ) -> None:
        self.config, self.section = config, config.ft
        self._world, self._state, self._setup, self._callbacks, self._lead = world, state, setup, callbacks, lead
        refuse_together(_faults(config, setup))
        self.taken: int | None = None
        """Samples of the epoch that all groups together had taken where this one has caught up; None for data that
        only its own rank can count."""
        self.participants = 0
        """Groups that took part in the last step."""
        self.lost_samples = 0
        """Samples that were dealt to groups which did not take part, in the steps of this attempt."""
        self.refused = 0
        """Steps that this group refused."""
        # Once: a forward pass of FSDP2 puts other tensors, the gathered ones, in the parameters' places.
        with torch.no_grad():
            self._tensors = {name: local(item) for name, item in flat.model_tensors(setup.assembled.parts).items()}
        weights = {f"{flat.MODEL}{name}" for name, _ in flat.named_parameters(setup.assembled.parts)}
        self._buffers = [
            item for name, item in self._tensors.items() if item.is_floating_point() and name not in weights
        ]
        """Running statistics, such as batch normalisation's: of the group's own batches until groups agree."""
        self._local_sync = self.section.sync != DDP
        self._outer = Outer(self.section, setup.parameters, self._momentum()) if self._local_sync else None
        self._compared = state.step > 0
        """Whether the groups are known to have begun with the same weights."""
        self._digest = sum(map(_bits, self._tensors.values())) & 0xFFFFFFFFFFFF
        self._before_sync = 0
        """Steps of this group until the next agreement, where groups do not agree at every step."""
        self._begun = self._joined = False
        self._stop_request = stop_request
        self._all_signalled = self._any_ended = False
        self._signalled_since: float | None = None
        self._group = ReplicaGroup(
            self.section,
            index=world.group,
            rank=world.ranks.rank,
            world_size=world.ranks.world_size,
            store=self._make_store(),
            lighthouse=_url(self.section.lighthouse or os.environ[LIGHTHOUSE_VARIABLE]),
            step=state.step // (self.section.sync_every if self._local_sync else 1),
            state=self._current,
            load=self._take_over,
            stopped=lambda: stop_request.number > 0,
        )

    def _momentum(self) -> list[Tensor]:
        """The outer optimizer's, in the order of the parameters; none without one."""
        prefix, tensors = f"{PREFIX}{OuterMomentum.name}.", self._callbacks.tensors()
        names = {id(item): name for name, item in flat.named_parameters(self._setup.assembled.parts)}
        wanted = [f"{prefix}{names[id(item)]}" for item in self._setup.parameters]
        return [tensors[name] for name in wanted] if self.section.sync == DILOCO else []

    def _make_store(self) -> tuple[str, int]:
        """A store of this group at the address at which the others reach it: rank 0 serves it."""
        address, port = address_of(self.section), 0
        if self._world.ranks.main:
            listening = listen(address, 0)
            port = listening.getsockname()[1]
            self._store = torch.distributed.TCPStore(
                address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        found: tuple[str, int] = gathered((address, port))[0]
        return found

    def begin(self) -> bool:
        """Meet the other groups, before a step is begun. Returns whether this group was behind, and has caught up.

        Raises:
            NoQuorum: there are too few.
        """
        if self._before_sync > 0:
            return False
        with waiting("the other replica groups"):
            healed = self._group.begin()
        self._begun = True
        if self._outer is not None:
            self._before_sync = self.section.sync_every
            self._outer.begin()
        if healed or not self._joined:
            self._joined = True
            self._lead.note(Event.JOINED, step=self._state.step, why="caught up" if healed else "")
        return healed

    def agree(self, counted: Tensor | None) -> bool:
        """Average the gradients of the step under way over the groups, and vote on it.

        Args:
            counted: what a sum of losses was divided by, in this group; None where the loss is a mean.

        Returns:
            Whether the step counts.
        """
        if self._local_sync:
            return True
        if not self._begun:  # the loop is not ours
            self.begin()
        self._begun = False
        meter = self._state.training_loss
        facts = self._facts(counted)
        parameters = self._setup.parameters
        with torch.no_grad(), waiting("the gradients of the other replica groups"):
            self._group.average([facts])
            alike = self._compared or self._group.are_equal(self._digest)
            if counted is not None:  # groups weigh by what they have counted
                share = counted / facts[2].to(counted.dtype).clamp(min=1e-12)
                for item in _gradients(parameters):
                    item.mul_(share)
            buffers = [item.clone() for item in self._buffers]
            present = torch.tensor([float(item.grad is not None) for item in parameters], device=self._world.device)
            absent = [item for item in parameters if item.grad is None]
            for item in absent:
                item.grad = torch.zeros_like(item)
            self._group.average([present, *_gradients(parameters), *buffers])
            committed = self._group.commit()
        if not committed:
            self.refused += 1
            self._lead.note(Event.REFUSED, step=self._state.step)
            return False
        self._compare(alike)
        meter.set_step_sums(facts[:2])
        for item, mean in zip(self._buffers, buffers, strict=True):
            item.copy_(mean)
        self._heard(facts)
        if absent:  # a parameter that no group has used is left alone by the optimizer
            used = dict(zip(map(id, parameters), present.tolist(), strict=True))
            for item in absent:
                if not used[id(item)]:
                    item.grad = None
        self._committed()
        return True

    def after_step(self) -> None:
        """Agree on weights, where groups do so every `ft.sync_every` steps."""
        if self._outer is None:
            return
        self._before_sync -= 1
        if self._before_sync > 0 and not self._is_last:
            return
        self._before_sync, self._begun = 0, False
        facts = self._facts(None)
        with torch.no_grad(), waiting("the weights of the other replica groups"):
            self._group.average([facts])
            alike = self._compared or self._group.are_equal(self._digest)
            self._group.average(self._outer.proposed())
            committed = self._group.commit()
            self._outer.end(committed=committed)
        if committed:
            self._compare(alike)
            self._committed()
            self._heard(facts)
        else:
            self.refused += 1
            self._lead.note(Event.REFUSED, step=self._state.step)

    def _facts(self, counted: Tensor | None) -> Tensor:
        """What groups average beside gradients: losses, counts, and whether they are asked to stop. (5,) in float64."""
        device, asked = self._world.device, self._stop_request
        weight = torch.ones(1, dtype=torch.float64, device=device) if counted is None else counted.reshape(1).double()
        stops = torch.tensor([bool(asked.number), asked.reason is not None], dtype=torch.float64, device=device)
        return torch.cat([self._state.training_loss.step_sums(device), weight, stops])

    def _compare(self, alike: bool) -> None:
        """Raises RuntimeError, on the ranks of some group at least, where groups did not begin with equal weights."""
        self._compared = True
        if not alike:
            raise RuntimeError(
                "the replica groups did not begin with the same weights: pass the model as a factory, which every "
                "group calls under the run's seed"
            )

    def _heard(self, facts: Tensor) -> None:
        *_, signalled, ended = facts.tolist()
        # The mean of noughts and ones.
        self._all_signalled, self._any_ended = signalled > 1 - 1e-6, ended > 0

    def signal_on_any_rank(self) -> int:
        """As `StopRequest.signal_on_any_rank`, such that groups which are all asked to stop do so at the same step. One
        that is asked alone leaves alone, after a moment. Collective in the group."""
        request = self._stop_request
        since = self._signalled_since
        alone = since is not None and time.monotonic() - since > _ALONE_SECONDS
        asked = torch.tensor([request.number, int(self._all_signalled or alone), int(self._any_ended)])
        if is_distributed():
            with waiting("the ranks' agreement on signals"):
                torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        number, now, ended = asked.tolist()
        if number and since is None:
            self._signalled_since = time.monotonic()
        if number and now:
            return int(number)
        return END_REQUESTED if ended else 0

    @property
    def _is_last(self) -> bool:
        return self._setup.cadence.steps is not None and self._state.step >= self._setup.cadence.steps

    def _committed(self) -> None:
        self.participants = self._group.participants
        missing = self._world.groups - self.participants
        steps = self.section.sync_every if self._local_sync else 1
        self.lost_samples += missing * steps * self._setup.samples_per_step // self._world.groups

    def scalars(self) -> dict[str, float]:
        """For a log line."""
        return {"ft.groups": self.participants, "ft.refused_steps": self.refused, "ft.lost_samples": self.lost_samples}

    def end(self) -> bool:
        """After the last step, meet the others once more: a group that has refused that step gets it from one that has
        not. Returns whether this group has caught up. Not after a run that is complete already."""
        self._lead.note(Event.TRAINED, step=self._state.step)
        self._before_sync = 0
        try:
            return self.begin()
        except NoQuorum:  # the others have been here before, or are gone
            return False

    def close(self) -> None:
        """Leave the other groups, once nobody fetches weights from this one any more."""
        self._group.close()

    def _current(self) -> dict[str, Any]:
        """This rank's state, for the same rank of a group that joins. Called while no step is under way."""
        setup, state = self._setup, self._state
        parts, train = setup.assembled.parts, setup.loaders["train"]
        optimizer = flat.optimizer_tensors(parts, setup.optimizer)
        taken = None
        if isinstance(train.sampler, ShardedSampler) and not state.between_epochs:
            # Of a step that is repeated, the batches are taken already, and the others repeat it too.
            saved = state.loader_before or train.state_dict()
            taken = dataloader.taken_by_all(
                saved, batch_size=train.batch_size or 1, data_degree=self._world.data_degree
            )
        return {
            "tensors": {**self._tensors, **{name: local(item) for name, item in self._callbacks.tensors().items()}},
            "optimizer": {name: local(item) for name, item in optimizer.items()},
            "shapes": {name: list(item.shape) for name, item in optimizer.items()},
            "options": flat.options_of(parts, setup.optimizer),
            "scheduler": setup.schedule.state_dict(),
            "scaler": None if setup.scaler is None else setup.scaler.state_dict(),
            "score": setup.score.state_dict(),
            "runner": {**state.state_dict(), "stopped_early": state.stopped_early},
            "loss": state.training_loss.sums(self._world.device),
            "callbacks": self._callbacks.state_dict(),
            "taken": taken,
            "lost_samples": self.lost_samples,
        }

    def _take_over(self, given: dict[str, Any]) -> None:
        """Continue from another group's state."""
        setup, state = self._setup, self._state
        parts, own_epoch = setup.assembled.parts, (state.epoch, state.epoch_step)
        for part in parts:
            # What an evaluation has gathered would be used instead of the weights that are loaded now.
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        mine = {**self._tensors, **{name: local(item) for name, item in self._callbacks.tensors().items()}}
        with torch.no_grad():
            for name, item in given["tensors"].items():
                mine[name].copy_(item)
            known = {name: Known(tuple(given["shapes"][name]), item.dtype) for name, item in given["optimizer"].items()}
            targets = flat.optimizer_targets(parts, setup.optimizer, known)
            for name, item in given["optimizer"].items():
                local(targets[name]).copy_(item)
        setup.optimizer.state.clear()
        flat.load_optimizer(parts, setup.optimizer, targets, given["options"])
        flat.load_extra(parts, given["options"]["extra"])
        setup.schedule.load_state_dict(given["scheduler"])
        if setup.scaler is not None and given["scaler"] is not None:
            setup.scaler.load_state_dict(given["scaler"])
        setup.score.load_state_dict(given["score"])
        state.load_state_dict(given["runner"])
        state.saved_at = -1  # what it continues from is in no checkpoint
        state.stopped_early = given["runner"]["stopped_early"]
        state.training_loss.set_sums(given["loss"].to(self._world.device))
        self._compared = True
        self._callbacks.load_state(given["callbacks"])
        if self._callbacks.load is not None:
            self._callbacks.load()
        self.taken, self.lost_samples = given["taken"], given["lost_samples"]
        if not isinstance(setup.loaders["train"].sampler, ShardedSampler):
            state.epoch, state.epoch_step = own_epoch


def _faults(config: RunnerConfig, setup: Setup) -> list[Violation]:
    """What replica groups cannot be made to agree on."""
    if setup.cadence.epochs is not None and not isinstance(setup.loaders["train"].sampler, ShardedSampler):
        rule = "with replica groups an iterable data set may end at another step in each, and epochs count its ends"
        return [Violation("epochs", config.epochs, rule, "set steps instead")]
    return []


def _bits(tensor: Tensor) -> int:
    """A whole number of a tensor's bits."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(raw.numpy().tobytes())


def _gradients(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    return [local(item.grad) for item in parameters if item.grad is not None]


def _url(address: str) -> str:
    return address if address.startswith("http") else f"http://{address}"
