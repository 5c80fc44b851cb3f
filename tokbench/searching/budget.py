"""The budget of a search: a share of the FLOPs, or a speed-up."""

from __future__ import annotations

from dataclasses import dataclass

from tokbench.errors import UserError
from tokbench.schedules import ScheduleError, parse_schedule


@dataclass(frozen=True)
class Budget:
    """`flops:0.35`, at most 35 % of the unreduced model's FLOPs, or `speedup:1.5`, at least 1.5 × its speed here."""

    kind: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:.10g}"

    @property
    def share(self) -> float:
        """The share of the unreduced model's FLOPs or time that may be spent."""
        return self.value if self.kind == "flops" else 1 / self.value


def parse_budget(text: str) -> Budget:
    """Parse a budget. Raises UserError that names the wrong part."""
    try:
        schedule = parse_schedule(f"searched:{text}")
    except ScheduleError as error:
        told = str(error).replace(f"schedule 'searched:{text}'", f"budget '{text}'").replace("searched:", "")
        raise UserError(told) from error
    return Budget(schedule.kind.partition(":")[2], schedule.values[0])
