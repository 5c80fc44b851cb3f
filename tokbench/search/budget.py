"""What a search may spend: a share of the FLOPs, or of the time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokbench.errors import UserError, nearest

KINDS = {"flops": "flops:0.35", "speedup": "speedup:1.5"}


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


def parse_budget(text: str | Budget) -> Budget:
    """Raises UserError, which names the wrong part."""
    if isinstance(text, Budget):
        return text
    kind, _, rest = str(text).strip().partition(":")
    examples = " or ".join(KINDS.values())
    if kind not in KINDS:
        raise UserError(f"budget '{text}': expected {examples}.{nearest(kind, KINDS)}")
    try:
        value = float(rest)
    except ValueError:
        value = math.nan
    if kind == "flops" and not 0 < value < 1:
        raise UserError(f"budget '{text}': expected a share of the FLOPs above 0 and below 1, as in {KINDS[kind]}")
    if kind == "speedup" and not 1 < value < math.inf:
        raise UserError(f"budget '{text}': expected a speed-up above 1, as in {KINDS[kind]}")
    return Budget(kind, value)
