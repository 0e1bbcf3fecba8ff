"""The methods, what each is tuned over, and the budget they share."""

from dataclasses import dataclass
from typing import NamedTuple

STUDY = "recovery"


class Point(NamedTuple):
    """A point of a grid; `beta` is the strength of the whole preference term."""

    learning_rate: float
    beta: float = 0.0


@dataclass(frozen=True)
class Method:
    """A loss. `reference` and `teacher` split `beta` between the two log-ratios; both 0 leave the term out."""

    label: str
    reference: float = 0.0
    teacher: float = 0.0
    kl_weight: float = 0.0
    sft_weight: float = 0.0

    @property
    def grid(self) -> tuple[Point, ...]:
        return PREFERENCE_GRID if self.reference or self.teacher else SFT_GRID

    def options(self, point: Point) -> dict[str, float | str]:
        """Keyword arguments of `DaDPOConfig`."""
        return {
            "beta_ref": self.reference * point.beta,
            "beta_teacher": self.teacher * point.beta,
            "kl_weight": self.kl_weight,
            "sft_weight": self.sft_weight,
            "kl_on": "chosen" if self.sft_weight else "both",
            "learning_rate": point.learning_rate,
        }


# As many points for everybody. A preference term multiplies sums over an answer, the other two are means over tokens.
PREFERENCE_GRID = (Point(1e-5, 0.1), Point(3e-5, 0.1), Point(1e-4, 0.1), Point(1e-4, 0.02))
SFT_GRID = (Point(1e-5), Point(3e-5), Point(1e-4), Point(3e-4))

METHODS = {
    "sft": Method("SFT", sft_weight=1.0),
    "sft+kl": Method("SFT + top-k KL", sft_weight=1.0, kl_weight=1.0),
    "ddpo": Method("dDPO (reference only)", reference=1.0),
    "dpkd": Method("DPKD-like (teacher only)", teacher=1.0),
    "dadpo": Method("daDPO", reference=0.5, teacher=0.5),
    "dadpo+kl": Method("daDPO + top-k KL", reference=0.5, teacher=0.5, kl_weight=1.0),
}


@dataclass(frozen=True)
class Setting:
    """`pairs` training pairs, `epochs` times over in batches of `batch` pairs; final runs with the seeds 1 to
    `seeds`, measured on the first `heldout` prompts."""

    pairs: int
    epochs: int
    batch: int
    seeds: int
    heldout: int
    validation: int  # of the training pairs: no run is trained on them, all tuning is judged by them
    max_new_tokens: int = 80
    k: int = 32


TUNING_SEED = 0
SETTINGS = {
    "cpu": Setting(pairs=32, epochs=1, batch=2, seeds=3, heldout=20, validation=16),
    "gpu": Setting(pairs=243, epochs=3, batch=8, seeds=5, heldout=56, validation=32),
    "smoke": Setting(pairs=2, epochs=1, batch=2, seeds=1, heldout=2, validation=2, max_new_tokens=4),
}
