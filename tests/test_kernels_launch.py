"""Launch configurations: the heuristic's arithmetic, and tuned tables that are right, damaged or foreign."""

import json
import warnings

import pytest
import torch

pytest.importorskip("triton")
from ditfast.kernels import launch  # noqa: E402

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
    config = launch.row_config("adaln_fwd", width, 256, 8, META)
    assert (config.block, config.tail, config.num_warps) == (block, tail, warps)
    assert config.block + config.tail >= width


def test_every_width_is_covered():
    for width in range(1, 8193):
        config = launch.row_config("adaln_fwd", width, 256, 8, META)
        assert width <= config.block + config.tail <= 1.5 * width + 1, width
        assert all(part & (part - 1) == 0 for part in (config.block, config.tail)), width


def test_rows_of_a_program():
    assert launch.row_config("adaln_fwd", 1152, 256, 1, META).rows == 1
    assert launch.row_config("adaln_fwd", 1152, 256, 64, META).rows == 8
    assert launch.row_config("adaln_fwd", 1152, 256, 256, META).rows == 16
    # the order of the backward's sums depends on the tokens alone
    for tokens, rows in ((1, 16), (256, 16), (257, 32), (4096, 32)):
        assert {launch.row_config("adaln_bwd", 1152, tokens, batch, META).rows for batch in (1, 3, 256)} == {rows}


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def table(entries):
    return {"schema": launch.SCHEMA, "environment": {}, "entries": entries}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    for cached in (launch._tuned, launch._row_config):
        cached.cache_clear()
    yield tmp_path
    for cached in (launch._tuned, launch._row_config):
        cached.cache_clear()


def test_a_tuned_table_overrides_the_heuristic(configs, monkeypatch):
    key = launch.table_key("adaln_fwd", torch.bfloat16, 1152, 200)
    assert key == "adaln_fwd/bfloat16/1152/256"
    write(configs / "nvidia-h200.json", table({key: {"rows": 2, "num_warps": 8}}))
    assert launch.table_path("NVIDIA H200") == configs / "nvidia-h200.json"
    assert launch._tuned("NVIDIA H200") == {key: {"rows": 2, "num_warps": 8}}
    assert launch._tuned("NVIDIA A100") == {}

    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

        @staticmethod
        def get_device():
            return 0

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert launch.row_config("adaln_fwd", 1152, 200, 8, OnGpu) == (1024, 128, 2, 8)
    assert launch.row_config("adaln_fwd", 1152, 300, 8, OnGpu).num_warps == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not a readable table"),
        ({"schema": "other/1", "entries": {}}, "must be a table of schema"),
        (table({"a/b/1/1": {"lanes": 3}}), "must set some of block, tail, rows, num_warps"),
        (table({"a/b/1/1": {"rows": "3"}}), "must hold whole numbers"),
        (table({"a/b/1/1": {"rows": -3}}), "must hold whole numbers"),
        (table([1]), "must be a table of schema"),
    ],
)
def test_a_damaged_table_warns_and_names_the_file(configs, data, message):
    path = configs / "nvidia-h200.json"
    write(path, data)
    with pytest.raises(ValueError, match=message) as error:
        launch.read_table(path)
    assert str(path) in str(error.value)
    with pytest.warns(UserWarning, match="follow the heuristic"):
        assert launch._tuned("NVIDIA H200") == {}


def test_committed_tables_are_sound():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in launch.CONFIGS.glob("*.json"):
            launch.read_table(path)
