"""Types of arguments that several public functions have."""

from typing import Literal

Backend = Literal["auto", "reference", "native", "triton"]
Reduction = Literal["mean", "sum", "none"]
Penalty = Literal["signed", "abs", "square", "relu"]
