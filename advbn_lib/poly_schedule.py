"""The polynomial schedule that segmentation networks are trained with."""

from __future__ import annotations

from dataclasses import dataclass

from advbn_lib.training import Schedule


@dataclass(frozen=True)
class PolySchedule(Schedule):
    """SGD whose rate falls as (1 - share of the training done) to a power, and not in steps.

    The released code trains the encoder at a tenth of the rate; the training loop here has one rate for all.

    Args:
        power: 0.9 as released; 1 is a straight line.
        min_lr: the rate never falls below.

    Raises:
        ValueError: there are milestones, which this schedule does not have, or ``power`` or ``min_lr`` is negative.
    """

    power: float = 0.9
    min_lr: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.milestones:
            raise ValueError(f"a polynomial schedule has no milestones, got {self.milestones}: use Schedule")
        if self.power < 0 or self.min_lr < 0:
            raise ValueError(f"power and min_lr must not be negative, got {self.power} and {self.min_lr}")

    def rate(self, epoch: float) -> float:
        """Learning rate at a point in time, in epochs from 0."""
        left = max(0.0, 1 - epoch / self.epochs)
        warm = min(1.0, epoch / self.warmup) if self.warmup else 1.0
        return max(self.lr * left**self.power, self.min_lr) * warm
