"""A sweep of which jobs are refused: all faults of all jobs, in one table."""

from __future__ import annotations

from collections.abc import Sequence

from danling_conf.sweep.preflight import Refused
from danling_conf.sweep.preflight_tables import fault_table
from danling_conf.topology.violation import ConfigRefused


class SweepRefused(ConfigRefused):
    """Raised where jobs of a sweep are refused; the report is their table.

    Args:
        refused: the jobs that are, in order.
        of: number of all jobs.
    """

    def __init__(self, refused: Sequence[Refused], of: int) -> None:
        self.refused, self.of = tuple(refused), of
        super().__init__([item for job in refused for item in job.violations])

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.refused, self.of)

    def report(self) -> str:
        fine = self.of - len(self.refused)
        count = f"{fine} of {self.of} jobs {'is' if fine == 1 else 'are'} fine"
        return "\n".join([*fault_table(self.refused, of=self.of), "", count])
