"""Batches for a loop of one's own: epoch after epoch without end, resumed at the very batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from danling_conf.components import dataloader
from danling_conf.components.batch import to_device
from danling_conf.runner.data import same_number_on_all_ranks
from danling_conf.topology.violation import ABSENT, SettingError


class Batches(Iterator[Any]):
    """An iterator over a loader's batches, on the device, which begins the next epoch by itself.

    Args:
        loader: of the training split; its data set has at least one batch.
        device: of this rank.

    Attributes:
        epoch: epochs done.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader, self.device, self.epoch = loader, device, 0
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        for _ in range(2):  # what is left of an epoch may be nothing
            if self._iterator is None:
                self._begin()
            batch = next(self._iterator, None)  # type: ignore[arg-type]
            if batch is not None:
                return to_device(batch, self.device)
            self._iterator = None
            self.epoch += 1
        raise SettingError("datasets", ABSENT, "an epoch of the training split has no batch", "check its data set")

    def _begin(self) -> None:
        dataloader.set_epoch(self.loader, self.epoch)
        self._iterator = same_number_on_all_ranks(self.loader, iter(self.loader))

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is: plain values and tensors."""
        return {"epoch": self.epoch, "loader": None if self._iterator is None else self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, data_degree: int) -> None:
        """Continue where a saved state was.

        Args:
            data_degree: the number of data ranks that it was saved under.

        Raises SettingError where an iterable data set was read by another number of ranks or workers.
        """
        self.epoch, self._iterator = state["epoch"], None
        if state["loader"] is None:
            return
        dataloader.set_epoch(self.loader, self.epoch)
        dataloader.resume(self.loader, state["loader"], data_degree=data_degree)
        # Now, not at the first batch: making it may draw from the generators, which are restored after this.
        self._iterator = same_number_on_all_ranks(self.loader, iter(self.loader))

    def close(self) -> None:
        """End the loader's worker processes."""
        self._iterator = None
        dataloader.stop_workers(self.loader)
