"""Tuned tables override the heuristics; damaged and foreign ones are named in a warning and ignored."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from ditfast.bench.cases.precision import float32_precision

pytest.importorskip("triton")
from ditfast.bench.tune.table import refresh  # noqa: E402
from ditfast.kernels import launch
from ditfast.kernels.configs import attention, tables
from ditfast.kernels.configs import gemm as gemm_config  # noqa: E402
from ditfast.kernels.configs import rows as row_config

GPU = "NVIDIA H200"
GEMM = "linear_gelu/bfloat16/4608/1152/256"


class OnGpu:
    """The attributes of a tensor that look-ups read."""

    is_cuda, dtype = True, torch.bfloat16

    @staticmethod
    def get_device():
        return 0


def table(entries, gpu=GPU, **rest):
    return {"schema": tables.SCHEMA, "gpu": gpu, "environment": {}, "entries": entries, **rest}


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A folder for tables, and an H200 to look them up."""
    monkeypatch.setattr(tables, "CONFIGS", tmp_path)
    monkeypatch.setattr(launch, "gpu", lambda index: launch.Gpu(GPU, (9, 0), 132))
    refresh()
    yield tmp_path
    refresh()


def test_keys_hold_fixed_sizes_and_round_varying_ones():
    assert tables.table_key("adaln_fwd", torch.bfloat16, (1152,), (200,)) == "adaln_fwd/bfloat16/1152/256"
    assert tables.table_key("adaln_fwd", torch.float32, (1152,), (256,)) == "adaln_fwd/float32/1152/256"
    assert tables.table_key("linear_gelu", torch.float16, (40, 10), (0,)) == "linear_gelu/float16/40/10/1"


def test_a_table_overrides_the_heuristic_of_a_row_kernel(configs):
    key = "adaln_fwd/bfloat16/1152/256"
    write(configs / "nvidia-h200.json", table({key: {"rows": 2, "num_warps": 8}}))
    assert tables.table_path(GPU) == configs / "nvidia-h200.json"
    assert tables.load(GPU) == {key: {"rows": 2, "num_warps": 8}}
    assert tables.load("NVIDIA A100") == {}
    assert row_config.row_config("adaln_fwd", 1152, 200, 8, OnGpu) == (1024, 128, 2, 8)
    assert row_config.row_config("adaln_fwd", 1152, 300, 8, OnGpu).num_warps == 4
    assert row_config.row_config("adaln_fwd", 1152, 200, 8, torch.empty(0)).num_warps == 4  # no GPU, no table


def gemm(demanded=False, rows=200, dtype=torch.bfloat16, operator="linear_gelu"):
    x = SimpleNamespace(is_cuda=True, dtype=dtype, get_device=OnGpu.get_device)
    return gemm_config.gemm_config(operator, rows, 4608, 1152, x, demanded)


def test_a_table_overrides_the_heuristic_of_a_gemm(configs):
    heuristic = gemm()
    gemm_config._gemm_config.cache_clear()
    write(configs / "nvidia-h200.json", table({GEMM: {"candidate": "triton", "block_n": 64, "group_m": 3}}))
    tables.load.cache_clear()
    assert gemm() == heuristic._replace(candidate="triton", block_n=64, group_m=3) != heuristic
    assert gemm(rows=300) != gemm()


def test_a_table_is_not_followed_where_it_does_not_apply(configs):
    """A demanded kernel, fp32 without the TF32 it was tuned with, tiles that the partial sums cannot have, parts
    without columns."""
    backward, single = GEMM.replace("gelu", "gelu_backward", 1), GEMM.replace("bfloat16", "float32")
    saved = GEMM.replace("gelu", "gelu_save", 1)
    entries = {GEMM: {"candidate": "separate", "block_n": 64}, backward: {"block_m": 128}}
    entries |= {single: {"block_n": 32, "parts": 1}, saved: {"block_n": 64, "parts": 8}}
    write(configs / "nvidia-h200.json", table(entries))
    assert gemm().candidate == "separate" and gemm().block_n == 64
    assert gemm(demanded=True).candidate == "triton" and gemm(demanded=True).block_n != 64
    assert gemm(operator="linear_gelu_backward").block_m == gemm_config.sum_rows(200, torch.bfloat16) == 64
    assert gemm(operator="linear_gelu_save").parts != 8
    with float32_precision("highest"):
        assert gemm(dtype=torch.float32).block_n != 32
    with float32_precision("high"):
        assert gemm(dtype=torch.float32).block_n == 32


def tiles(operator="attention_dkv", dtype=torch.bfloat16, biased=False, tokens=200):
    qkv = SimpleNamespace(shape=(4, tokens, 3, 16, 72), is_cuda=True, dtype=dtype, get_device=OnGpu.get_device)
    return attention.launch_config(operator, qkv, biased)


def test_a_table_overrides_the_heuristic_of_attention(configs):
    """Not with a bias, in fp32 without TF32, or with tiles finer than a row of sums stands for."""
    heuristic = tiles()
    attention._launch_config.cache_clear()
    key = "attention_{}/{}/72/256".format
    config = {"block_m": 128, "block_n": 16, "num_warps": 8, "num_stages": 1}
    entries = {key("dkv", "bfloat16"): config, key("fwd", "float32"): config, key("dq", "bfloat16"): {"block_m": 32}}
    write(configs / "nvidia-h200.json", table(entries))
    tables.load.cache_clear()
    assert tiles() == (128, 16, 8, 1) != heuristic
    assert tiles(tokens=300) != tiles() != tiles(biased=True)
    assert tiles("attention_dq").block_m >= 64  # a sample of 200 tokens has 4 rows of sums
    assert tiles("attention_dbias", biased=True)
    for precision, followed in (("highest", False), ("high", True)):
        with float32_precision(precision):
            assert (tiles("attention_fwd", torch.float32) == (128, 16, 8, 1)) == followed


def test_tiles_for_tma_are_not_followed_without_it(configs, monkeypatch):
    write(configs / "nvidia-h200.json", table({GEMM: {"candidate": "triton", "tma": 1}}))
    assert (gemm().candidate, gemm().tma) == ("triton", 1)
    gemm_config._gemm_config.cache_clear()
    monkeypatch.setattr(launch, "gpu", lambda index: launch.Gpu(GPU, (12, 0), 170))
    assert gemm().tma == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not a readable table"),
        ("\udcff", "is not a readable table"),
        ([1], "must be a table of schema"),
        (table({}) | {"schema": "other/1"}, "must be a table of schema"),
        (table([1]), "must be a table of schema"),
        ({"schema": tables.SCHEMA, "entries": {}}, "must name its gpu and its environment"),
        (table({}) | {"environment": None}, "must name its gpu and its environment"),
        (table({"a/b/1/1": {"rows": 3}}), "must be of an operator among adaln_fwd"),
        (table({"adaln_fwd/int64/8/8": {"rows": 3}}), "must be of a dtype among bfloat16, float16, float32, and sizes"),
        (table({"attention_inference/bfloat16/x/8": {"candidate": "sdpa"}}), "must be of a dtype among"),
        (table({"attention_inference/bfloat16/8/8": {"candidate": "separate"}}), "must name a candidate among"),
        (table({"adaln_fwd/bfloat16/8/8": {"lanes": 3}}), "must set some of block, tail, rows, num_warps"),
        (table({"adaln_fwd/bfloat16/8/8": {}}), "must set some of"),
        (table({"adaln_fwd/bfloat16/8/8": [1]}), "must set some of"),
        (table({"adaln_fwd/bfloat16/8/8": {"candidate": "triton"}}), "must set some of block"),
        (table({"adaln_fwd/bfloat16/8/8": {"rows": "3"}}), "must hold whole numbers, rows at least 1"),
        (table({"adaln_fwd/bfloat16/8/8": {"rows": True}}), "must hold whole numbers"),
        (table({"adaln_fwd/bfloat16/8/8": {"rows": 2.0}}), "must hold whole numbers"),
        (table({"adaln_fwd/bfloat16/8/8": {"rows": -3}}), "must hold whole numbers"),
        (table({GEMM: {"block_m": 8}}), "must hold whole numbers, block_m at least 16"),
        (table({"adaln_fwd/bfloat16/8/8": {"num_warps": 3}}), "must hold a power of two as num_warps"),
        (table({GEMM: {"block_k": 48}}), "must hold a power of two as block_k"),
        (table({"adaln_fwd/bfloat16/8/8": {"num_warps": 64}}), "must hold 32 as num_warps at the most"),
        (table({GEMM: {"max_registers": 256}}), "must hold 255 as max_registers at the most"),
        (table({GEMM: {"block_m": 512}}), "must hold 256 as block_m at the most"),
        (table({GEMM: {"tma": 4}}), "must hold 2 as tma at the most"),
        (table({"adaln_fwd/bfloat16/1152/256": {"block": 1024, "tail": 64}}), "must cover a row of 1152"),
        (table({"adaln_bwd/bfloat16/1152/256": {"tail": 128}}), "must cover a row of 1152"),
        (table({GEMM: {"candidate": "cutlass"}}), "must name a candidate among triton, separate, cublaslt"),
        (table({GEMM.replace("gelu", "gelu_save", 1): {"candidate": "cublaslt"}}), "among triton, separate, got"),
        (table({}, measured=[1]), "must hold an object as measured"),
        (table({}, measured={GEMM: {"ms": 1.0}}), "must be measured by ms, heuristic_ms, noise"),
        (table({}, measured={GEMM: {"ms": None, "heuristic_ms": 1.0, "noise": 0.1}}), "must be measured by"),
        (table({}, measured={GEMM: {"ms": -1, "heuristic_ms": 1.0, "noise": 0.1}}), "must be measured by"),
        (table({}, measured={GEMM: {"ms": 1, "heuristic_ms": 1, "noise": 0, "shape": 3}}), "must be measured by"),
        (json.dumps(table({}, measured={GEMM: {"ms": 0, "heuristic_ms": None, "noise": float("nan")}})), "be measured"),
    ],
)
def test_a_damaged_table_warns_and_names_the_file(configs, data, message):
    path = configs / "nvidia-h200.json"
    if data == "\udcff":
        path.write_bytes(b"\xff")
    else:
        write(path, data)
    with pytest.raises(ValueError, match=message) as error:
        tables.read_table(path)
    assert str(path) in str(error.value)
    with pytest.warns(UserWarning, match="follow the heuristic") as caught:
        assert tables.load(GPU) == {}
    assert str(path) in str(caught[0].message)


def test_a_foreign_table_warns_and_names_the_file(configs):
    path = configs / "nvidia-h200.json"
    write(path, table({"adaln_fwd/bfloat16/1152/256": {"num_warps": 8}}, gpu="NVIDIA A100"))
    with pytest.warns(UserWarning, match="was tuned on 'NVIDIA A100', this GPU is 'NVIDIA H200'") as caught:
        assert row_config.row_config("adaln_fwd", 1152, 256, 8, OnGpu).num_warps == 4
    assert str(path) in str(caught[0].message)


def test_measured_times_are_stored_apart_from_the_entries(configs):
    record = {"ms": 1.5, "heuristic_ms": None, "noise": None, "shape": "M=8", "torch": "2.13.0"}
    path = configs / "nvidia-h200.json"
    write(path, table({GEMM: {"candidate": "separate"}}, measured={GEMM: record}))
    assert tables.read_table(path)["measured"] == {GEMM: record}
    assert tables.load(GPU) == {GEMM: {"candidate": "separate"}}
    write(path, table({}))
    assert tables.read_table(path)["measured"] == {}


def test_committed_tables_are_sound():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in tables.CONFIGS.glob("*.json"):
            tables.load.cache_clear()
            assert tables.load(tables.read_table(path)["gpu"]), path  # found by the GPU's name
