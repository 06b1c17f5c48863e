"""Launch configurations of row kernels: the heuristic's arithmetic. Tuned tables: test_tables.py."""

import pytest
import torch

pytest.importorskip("triton")
from ditfast.kernels.configs import rows as row_config  # noqa: E402

META = torch.empty(0, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(
    ("width", "block", "tail", "warps"),
    [
        (1, 1, 0, 1),
        (72, 64, 8, 1),
        (200, 256, 0, 1),
        (384, 512, 0, 2),
        (768, 1024, 0, 4),
        (1024, 1024, 0, 4),
        (1152, 1024, 128, 4),
        (1280, 1024, 256, 4),
        (1408, 2048, 0, 8),
        (8192, 8192, 0, 16),
    ],
)
def test_a_row_is_covered_with_little_waste(width, block, tail, warps):
    config = row_config.row_config("adaln_fwd", width, 256, 8, META)
    assert (config.block, config.tail, config.num_warps) == (block, tail, warps)
    assert config.block + config.tail >= width


def test_every_width_is_covered():
    for width in range(1, 8193):
        config = row_config.row_config("adaln_fwd", width, 256, 8, META)
        assert width <= config.block + config.tail <= 1.5 * width + 1, width
        assert all(part & (part - 1) == 0 for part in (config.block, config.tail)), width


def test_rows_of_a_program():
    assert row_config.row_config("adaln_fwd", 1152, 256, 1, META).rows == 1
    assert row_config.row_config("adaln_fwd", 1152, 256, 64, META).rows == 8
    assert row_config.row_config("adaln_fwd", 1152, 256, 256, META).rows == 16
    # the order of the backward's sums depends on the tokens alone
    for tokens, rows in ((1, 16), (64, 16), (65, 32), (4096, 32)):
        assert {row_config.row_config("adaln_bwd", 1152, tokens, batch, META).rows for batch in (1, 3, 256)} == {rows}
