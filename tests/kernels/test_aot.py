"""Every kernel compiled for sm_80 and sm_90 without a GPU, within its budget; broken budgets are reported."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from ditfast.cli import main  # noqa: E402
from ditfast.kernels.aot.compile import Budget, KernelCase, Report, resident_warps, violations  # noqa: E402
from ditfast.kernels.configs import gemm  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.subprocess

# only the first case of each kernel, dtype and architecture, and of each rows, width or head dim
PART = """
import random, sys
from dataclasses import replace
from ditfast.kernels.aot import cases
from ditfast.kernels.aot.compile import ARCHITECTURES

def part(whole=cases.cases):
    every = [replace(case, arch=arch) for case in whole() for arch in ARCHITECTURES if case.arch in (None, arch)]
    random.Random(0).shuffle(every)
    covered = set()
    for case in every:
        first = {(case.name, case.dtype, case.arch), case.shape.partition(" N=")[0]} - covered
        covered |= first
        if first:
            yield case

cases.cases = part
from ditfast.cli import main
main()
"""


def run(*command):
    """A fresh interpreter with the kernels defined for the compiler, not for Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "300"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", params=["part", pytest.param("whole", marks=pytest.mark.long)])
def report(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "report.json"
    start = ("-c", PART) if request.param == "part" else ("-m", "ditfast")
    result = run(*start, "kernels", "--arch", "sm_80", "--arch", "sm_90", "--json", str(path))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(path.read_text()) | {"whole": request.param == "whole"}


def test_every_kernel_is_within_its_budget(report):
    assert report["schema"] == "ditfast.kernels/1"
    assert len(report["kernels"]) > (400 if report["whole"] else 100)
    assert not [row for row in report["kernels"] if row["violations"]]
    for row in report["kernels"]:
        assert row["spill_bytes"] == 0
        assert not any(name.startswith(("LDL", "STL")) for name in row["instructions"])


def test_the_report_covers_what_it_should(report):
    rows = {(row["kernel"], row["shape"], row["dtype"], row["arch"]) for row in report["kernels"]}
    operators = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
    names = [f"{operator}, {direction}" for operator in operators for direction in ("forward", "backward")]
    widths, dtypes = (384, 768, 1024, 1152), ("bf16", "fp32", "bf16, fp32 stream")
    for name, dtype, arch in itertools.product(names, dtypes, ("sm_80", "sm_90")):
        present = [(name, f"D={width}", dtype, arch) in rows for width in widths]
        assert all(present) if report["whole"] else any(present), (name, dtype, arch)
    for row in report["kernels"]:
        if row["kernel"].endswith((", forward", ", backward")) and "attention" not in row["kernel"]:
            assert row["instructions"]["LDG.E.128"] and row["instructions"]["STG.E.128"], row


EPILOGUES = (
    "linear_gelu",
    "linear_gelu_save",
    "linear_gelu_backward",
    "linear_gated_residual",
    "linear_gated_residual_save",
)


def test_matrix_kernels_run_on_the_tensor_cores(report):
    """Every epilogue at the widths of S, B, L and XL, and attention: wgmma and TMA on Hopper, cp.async elsewhere."""
    expected = {"sm_80": {"HMMA", "LDGSTS"}, "sm_90": {"HGMMA", "UTMALDG", "UTMASTG"}}
    rows = [row for row in report["kernels"] if row["dtype"] != "fp32"]
    for arch, instructions in expected.items():
        for operator in EPILOGUES:
            shapes = [row for row in rows if (row["kernel"], row["arch"]) == (operator, arch)]
            dtypes = {"bf16", "tf32"} | ({"bf16, fp32 stream"} if "residual" in operator else set())
            assert {row["dtype"] for row in shapes} == dtypes
            for width in (384, 768, 1024, 1152) if report["whole"] else ():
                inner = 4 * width if "residual" in operator else width
                assert sum(row["shape"].split(", ")[0].endswith(f"K={inner}") for row in shapes) >= 2, (operator, width)
            for row in shapes:
                opcodes = {name.split(".")[0] for name in row["instructions"]}
                assert instructions <= opcodes and not (arch == "sm_90" and "HMMA" in opcodes), row
        attention = [row for row in rows if row["kernel"].startswith("self_attention") and row["arch"] == arch]
        assert {row["kernel"] for row in attention} >= {
            f"self_attention, {part}" for part in ("forward", "d_q", "d_k and d_v", "d_bias")
        }
        for row in attention:
            opcodes = {name.split(".")[0] for name in row["instructions"]}
            assert {"HMMA" if arch == "sm_80" else "HGMMA", "LDGSTS"} <= opcodes, row


def test_the_activation_is_taken_once_an_element(report):
    """It is not recomputed in other registers or in code for an empty sum."""
    for row in report["kernels"]:
        if row["kernel"] in EPILOGUES and "gelu" in row["kernel"] and row["dtype"] == "bf16":
            rows, columns, inner = (int(size[2:]) for size in row["shape"].split())
            gpu = {"sm_80": (8, 108), "sm_90": (9, 132)}[row["arch"]]
            arguments = (row["kernel"], rows, columns, inner, torch.bfloat16, *gpu)
            config = gemm.heuristic(*arguments, demanded=True)
            a_thread = config.block_m * config.block_n // (32 * config.num_warps)
            assert row["instructions"]["MUFU.TANH"] == a_thread, row


def test_two_blocks_share_a_multiprocessor(report):
    """The 128 x 128 x 64 tiles of sm_80: 8 warps each, at most 128 registers a thread."""
    rows = [row for row in report["kernels"] if row["arch"] == "sm_80" and row["kernel"] in EPILOGUES]
    large = [row for row in rows if row["dtype"] == "bf16" and row["num_warps"] == 8]
    assert large and (not report["whole"] or {row["kernel"] for row in large} == set(EPILOGUES))
    assert all(row["resident_warps"] >= 16 and row["registers"] <= 128 for row in large)


FAULTS = """
import importlib, json, pathlib, sys
from dataclasses import replace
import torch, triton
from ditfast.kernels.aot import cases
from ditfast.kernels.aot.compile import compile_case, violations

compiled = {case.kernel.fn.__name__ for case in cases.cases()}
missing = []
for path in pathlib.Path(sys.argv[1]).glob("*.py"):
    module = importlib.import_module(f"ditfast.kernels.{path.stem}")
    for name, value in vars(module).items():
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and name not in compiled:
            missing.append(name)

case = cases._backward("gated_residual_layer_norm_modulate", 8192, torch.bfloat16, torch.bfloat16)
print(json.dumps({"missing": missing, "spills": violations(compile_case(case, "sm_80"))}))

case = cases._forward("gated_residual", 384, torch.bfloat16, torch.bfloat16)
case = replace(case, budget=replace(case.budget, registers=16, instructions=("HGMMA",)))
cases.cases = lambda: [case]
from ditfast.cli import main
sys.argv = ["ditfast", "kernels", "--arch", "sm_90"]
main()
"""


@pytest.fixture(scope="module")
def faults():
    """(kernels without a case and what spills, the command with a broken budget)."""
    result = run("-c", FAULTS, str(ROOT / "kernels"))
    assert result.stdout.startswith("{"), result.stdout + result.stderr
    return json.loads(result.stdout.partition("\n")[0]), result


def test_every_kernel_of_the_folder_is_compiled(faults):
    """A new @triton.jit kernel must come with a case."""
    assert faults[0]["missing"] == []


def test_a_broken_budget_fails_the_command(faults):
    _, result = faults
    assert result.returncode == 1
    assert ", at most 16 allowed" in result.stdout and "no HGMMA instruction" in result.stdout


def test_spills_are_found(faults):
    """Rows of 8192 in the fused backward spill: the widest there is, far from any model's width."""
    assert "spills" in faults[0]["spills"][0]


def test_bad_arguments(monkeypatch, capsys):
    for variable, arch, message in (
        ("0", "sm_75", "arch must be one of sm_80, sm_90, got 'sm_75'"),
        ("1", "sm_80", "unset TRITON_INTERPRET"),
    ):
        monkeypatch.setenv("TRITON_INTERPRET", variable)
        monkeypatch.setattr(sys, "argv", ["ditfast", "kernels", "--arch", arch])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


CASE = KernelCase("k", "D=1", "bf16", None, {}, {}, frozenset(), 4, Budget(64, 4096, 16, 0.5, ("LDG.E.128",)))
WITHIN = Report(CASE, "sm_90", 64, 0, 4096, 16, 0.5, {"LDG.E.128": 1})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 65}, "registers 65, at most 64 allowed"),
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"instructions": {"LDG.E.128": 1, "STL.64": 2}}, "2 local loads and stores"),
        ({"shared": 4097}, "shared 4097, at most 4096 allowed"),
        ({"resident_warps": 15}, "resident warps 15, at least 16 wanted"),
        ({"wide": 0.49}, "49% of global bytes in 128-bit accesses"),
        ({"instructions": {}}, "no LDG.E.128 instruction"),
    ],
)
def test_violations(change, message):
    sentences = violations(replace(WITHIN, **change))
    assert sentences == [] if message is None else (len(sentences) == 1 and message in sentences[0])


def test_shared_memory_is_held_against_the_hardware():
    generous = replace(CASE, budget=replace(CASE.budget, shared=1 << 20, resident_warps=0))
    assert violations(replace(WITHIN, case=generous, shared=227 * 1024)) == []
    assert "sm_90 has 232448 a block" in violations(replace(WITHIN, case=generous, shared=227 * 1024 + 1))[0]


def test_resident_warps_by_hand():
    assert resident_warps("sm_90", 4, 128, 0) == 16  # 65536 / (4 * 32 * 128) = 4 blocks
    assert resident_warps("sm_90", 4, 121, 0) == 16  # registers come in eights
    assert resident_warps("sm_90", 4, 120, 0) == 16  # 4.27 blocks
    assert resident_warps("sm_90", 8, 32, 0) == 64
    assert resident_warps("sm_90", 1, 32, 0) == 32  # at most 32 blocks
    assert resident_warps("sm_90", 8, 32, 100 * 1024) == 16  # 228 / 101 = 2 blocks
    assert resident_warps("sm_80", 8, 32, 100 * 1024) == 8
