"""How operators are measured. Result files need these names, and ``--help`` must not import torch."""

from __future__ import annotations

from typing import Literal

Direction = Literal["forward", "backward"]
Unit = Literal["GB/s", "TFLOP/s"]
