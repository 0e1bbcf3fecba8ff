"""The choices of the losses by name. Imports nothing, so that a command's help can list them at once."""

from typing import Literal

LossType = Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"]
DivergenceKind = Literal["forward_kl", "reverse_kl", "js"]
Support = Literal["tail", "renormalized", "truncated"]
Sides = Literal["both", "chosen", "rejected"]
