"""The command ``ditfast`` with two narrow blocks in place of every named model: what a campaign's rehearsal runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import config

if TYPE_CHECKING:
    import torch

    from ..bench.records.files import Ceilings


def main() -> None:
    """The entry point of ``python -m ditfast.cli.rehearsed``."""
    from ..bench.measure import ceilings
    from .command import main as command

    # a sixteenth of their widths, so that each still has its own name
    config.MODELS = {
        name: replace(model, depth=2, hidden_size=model.hidden_size // 16, num_heads=2)
        for name, model in config.MODELS.items()
    }
    measure = ceilings.measure_ceilings
    ceilings.CPU_COPY_BYTES, ceilings.CPU_MATMUL, ceilings.CPU_MATMUL_MAX = 1 << 20, 128, 128

    def briefly(device: torch.device, precisions: Iterable[str], seconds: float = 0.0) -> Ceilings:
        return measure(device, precisions, 0.0)

    ceilings.measure_ceilings = briefly
    command()


if __name__ == "__main__":
    main()
