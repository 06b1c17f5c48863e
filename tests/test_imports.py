"""The house rules: who imports whom, what appears nowhere, and that `import ditfast` is light and needs no triton."""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import ditfast

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Rule:
    """What a room may import: other rooms, packages, and packages only inside functions (optional or heavy ones).

    "face" is ``ditfast/__init__.py``; its ``__version__`` is open to everyone, the standard library too.
    """

    rooms: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()


_KERNELS = ("kernels.launch", "kernels.configs", "kernels", "kernels.rehearsal", "kernels.aot")
_GROUND = ("gone", "config", "parity", "plain", "files", "environment", "console")
_CORE = (*_GROUND, "reference", "ops", "model")
_PRODUCT = (*_CORE, "checkpoint", "adapters", "inference", "training")
_BENCH = ("torch", "numpy", "typer", "rich")
_BENCH_INSIDE = ("diffusers", "matplotlib", "triton")


def _bench(*rooms: str) -> Rule:
    """A room of the harness: everything of the product, and the rooms of the harness that lie below it."""
    below = tuple(f"bench.{room}" for room in rooms)
    return Rule(("face", *_KERNELS, *_PRODUCT, "testing", *below), _BENCH, _BENCH_INSIDE)


RULES = {
    "gone": Rule(),
    "config": Rule(),
    "files": Rule(),
    "parity": Rule((), ("torch",)),
    "plain": Rule((), ("torch",)),
    "environment": Rule(("face",), (), ("torch",)),
    "console": Rule((), ("typer", "rich")),
    "reference": Rule(("config",), ("torch",)),
    # the ground of the kernels: where they run
    "kernels.launch": Rule((), ("torch", "triton")),
    "kernels.configs": Rule(_KERNELS[:1], ("torch", "triton")),
    "kernels": Rule(_KERNELS[:2], ("torch", "triton")),
    "kernels.rehearsal": Rule(_KERNELS[:3], ("torch", "triton")),
    "kernels.aot": Rule(_KERNELS[:3], ("torch", "triton")),
    "ops": Rule(("config", "reference", *_KERNELS[:3]), ("torch",), ("triton", "flash_attn")),
    "testing": Rule(("config", "parity", "reference", "ops"), ("torch",)),
    "model": Rule((*_GROUND, "reference", "ops"), ("torch",)),
    "checkpoint": Rule(_CORE, ("torch", "numpy", "safetensors")),
    "adapters": Rule(_CORE, ("torch",), ("diffusers",)),
    "inference": Rule((*_CORE, "checkpoint", "adapters"), ("torch", "numpy"), ("diffusers",)),
    "training": Rule((*_CORE, "checkpoint", "adapters"), ("torch", "numpy"), ("rich",)),
    "evaluation": Rule(_GROUND, ("torch", "numpy"), ("torch_fidelity",)),
    "sampling": Rule(("face", *_CORE, "checkpoint", "inference"), ("torch", "numpy"), ("diffusers", "rich", "PIL")),
    "bench.records": _bench(),
    "bench.cases": _bench("records"),
    "bench.cost": _bench("cases", "records"),
    "bench.measure": _bench("cases", "records"),
    "bench.report": _bench("records"),
    "bench.options": _bench("cases"),
    "bench.suites": _bench("cases", "cost", "measure", "records", "report"),
    "bench.commands": _bench("cases", "cost", "measure", "options", "records", "report", "suites"),
    "bench.prove": _bench("cases", "measure", "options", "records", "report", "suites"),
    "bench.tune": _bench("cases", "measure", "options", "records", "report"),
    "bench.warm": _bench("cases", "measure", "options", "prove", "records", "suites", "tune"),
    "bench.campaign": _bench("cases", "measure", "options", "records", "report", "suites", "warm"),
    "bench.command": _bench("campaign", "commands", "report"),
    "cli": Rule(
        ("face", *_PRODUCT, "sampling", "evaluation", *(f"bench.{room}" for room in ("cases", "command", "measure",
         "prove", "records", "tune", "warm"))),
        ("typer",),
        ("torch", "rich"),
    ),
    "main": Rule(("cli",)),
}
# bench/'s files for pytest: the harness's rule, and what runs them
RULES["bench tests"] = replace(
    _bench("cases", "measure", "records"), packages=(*_BENCH, "pytest"), inside=(*_BENCH_INSIDE, "pytest_benchmark")
)
# a class of diffusers' own, imported when it is asked for
RULES["pipeline"] = replace(
    RULES["inference"],
    rooms=("inference", *RULES["inference"].rooms),
    packages=(*RULES["inference"].packages, "diffusers"),
)
FACE = "face"


def room_of(module: str) -> str:
    """``ditfast.ops.adaln`` -> ``ops``, ``ditfast.bench.cases.case`` -> ``bench.cases``: the longest with a rule."""
    parts = [part.strip("_") for part in module.split(".")[1:]]
    if not parts:
        return FACE
    inner = ".".join(parts[:2])
    return inner if parts[0] == "bench" or inner in RULES else parts[0]


def module_of(path: Path) -> str | None:
    """``kernels/adaln.py`` -> ``ditfast.kernels.adaln``; None for a file that is not of the package."""
    if path.suffix != ".py" or path.parts[0] not in ("ditfast", "kernels", "bench"):
        return None
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "ditfast" else ("ditfast", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, package: str, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(imported module, whether the import waits for a call or a type checker) of every import statement."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = ".".join(filter(None, [base if node.level else "", node.module or ""]))
            # "from ditfast import x" is about x, and so is every import of a module from its package
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if source == "ditfast" or _is_module(name) else source, inside
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports_of(node, package, inside or function or checking)


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def violations(source: str, path: Path) -> list[str]:
    """What a file imports against the rules, as sentences."""
    module = module_of(path)
    assert module is not None
    room = room_of(module)
    if path.parts[0] == "bench" and (path.name == "conftest.py" or path.match("test_*.py")):
        room = "bench tests"
    if path == Path("ditfast/inference/pipeline.py"):
        room = "pipeline"
    if room == FACE:
        return []  # imports lazily and by name; the tests below run it
    if room not in RULES:
        return [f"{path}: no rule for the room {room!r}; add it to RULES and to CONTRIBUTING.md"]
    rule, messages = RULES[room], []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for name, inside in imports_of(ast.parse(source), package):
        top = name.partition(".")[0]
        if top == "ditfast":
            exported = name.count(".") == 1 and name.split(".")[1] in {*ditfast.__all__} - {"ops", "reference"}
            target = FACE if exported else room_of(name)
            if target not in (room, *rule.rooms) and name != "ditfast.__version__":
                messages.append(f"{path}: {room} must not import {name}")
        elif top not in sys.stdlib_module_names and top not in rule.packages:
            if top not in rule.inside:
                messages.append(f"{path}: {room} must not import {name}")
            elif not inside:
                messages.append(f"{path}: {room} must import {name} inside a function")
    return messages


def test_every_file_keeps_the_import_rules(source_files: list[Path]) -> None:
    files = [path for path in source_files if module_of(path)]
    assert len(files) > 10
    messages = [text for path in files for text in violations((ROOT / path).read_text(), path)]
    assert not messages, "\n".join(messages)


def test_imports_run_one_way() -> None:
    order = [FACE, *RULES]
    for room, rule in RULES.items():
        above = [other for other in rule.rooms if order.index(other) >= order.index(room)]
        assert not above, f"{room} imports {above}, which stand below it in RULES"


def test_no_module_of_a_room_is_private(source_files: list[Path]) -> None:
    rooms = ("ditfast", "kernels", "bench", "tests")
    private = [path for path in source_files if path.parts[0] in rooms and path.stem.startswith("_")]
    assert {path.name for path in private} <= {"__init__.py", "__main__.py"}


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("kernels/adaln.py", "from ditfast.ops import adaln", "kernels must not import ditfast.ops"),
        ("kernels/adaln.py", "import numpy", "kernels must not import numpy"),
        ("kernels/adaln.py", "import torch\nimport triton\nfrom . import launch\nfrom .launch import x", None),
        ("ditfast/reference/dit.py", "from ..config import DiTConfig\nfrom . import ops", None),
        ("ditfast/reference/dit.py", "from ..ops import adaln", "reference must not import ditfast.ops"),
        ("ditfast/reference/dit.py", "import numpy", "reference must not import numpy"),
        ("ditfast/ops/adaln.py", "from ..model import DiT", "ops must not import ditfast.model"),
        ("ditfast/ops/adaln.py", "from .. import model", "ops must not import ditfast.model"),
        ("ditfast/ops/adaln.py", "from ditfast import DiT", "ops must not import ditfast.DiT"),
        ("ditfast/ops/adaln.py", "import triton", "ops must import triton inside a function"),
        ("ditfast/ops/adaln.py", "def f():\n    import triton", None),
        ("ditfast/model/dit.py", "from ..bench.cases import case", "model must not import ditfast.bench.cases.case"),
        ("ditfast/checkpoint/infer.py", "from .. import __version__\nfrom ..model import DiT", None),
        ("bench/measure/runner.py", "import ditfast\nfrom ditfast import DiT\nfrom ...parity import judge", None),
        ("bench/measure/runner.py", "from ditfast.cli import app", "bench.measure must not import ditfast.cli"),
        ("bench/measure/runner.py", "import pandas", "bench.measure must not import pandas"),
        ("bench/measure/runner.py", "import pytest", "bench.measure must not import pytest"),
        ("bench/cases/case.py", "def f():\n    import pytest", "bench.cases must not import pytest"),
        ("bench/cases/case.py", "from ..measure import timing", "must not import ditfast.bench.measure.timing"),
        ("kernels/launch.py", "from .configs import rows", "must not import ditfast.kernels.configs.rows"),
        ("kernels/adaln.py", "from .configs.rows import x\nfrom .launch import y", None),
        ("bench/thing/x.py", "import torch", "no rule for the room 'bench.thing'"),
        ("bench/test_model_cpu.py", "import pytest\nfrom ditfast.parity import judge", None),
        ("bench/conftest.py", "import pytest\nfrom ditfast import ops", None),
        ("bench/conftest.py", "import pytest_benchmark", "bench tests must import pytest_benchmark inside"),
        ("bench/conftest.py", "from ditfast.cli import app", "bench tests must not import ditfast.cli"),
        ("kernels/test_adaln.py", "import pytest", "kernels must not import pytest"),
        ("ditfast/inference/samplers.py", "import diffusers", "inference must import diffusers inside a function"),
        ("ditfast/inference/pipeline.py", "import diffusers\nfrom .engine import Engine", None),
        ("ditfast/cli/command.py", "import torch", "cli must import torch inside a function"),
        ("ditfast/cli/command.py", "if TYPE_CHECKING:\n    import torch", None),
        ("ditfast/tokens.py", "import torch", "no rule for the room 'tokens'"),
    ],
)
def test_the_import_rules_find_violations(path: str, source: str, message: str | None) -> None:
    messages = violations(source, Path(path))
    assert len(messages) == (message is not None)
    assert message is None or message in messages[0]


def forbidden(source: str) -> list[str]:
    """Calls that may appear nowhere: unsafe loading, and what Triton has removed."""
    messages = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            if not safe:
                messages.append(f"line {node.lineno}: torch.load without weights_only=True")
        if isinstance(node, ast.Attribute) and (node.attr == "make_block_ptr" or ast.unparse(node) == "tl.advance"):
            messages.append(f"line {node.lineno}: {ast.unparse(node)} is gone from Triton")
    return messages


def test_nothing_forbidden_appears(source_files: list[Path]) -> None:
    messages = [
        f"{path}, {text}"
        for path in source_files
        if path.suffix == ".py"
        for text in forbidden((ROOT / path).read_text())
    ]
    assert not messages, "\n".join(messages)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.load(path)", 1),
        ("torch.load(f(path),\n    weights_only=False)", 1),
        ("torch.load(f(path),\n    weights_only=True, mmap=True)", 0),
        ("p = tl.make_block_ptr(x)\np = tl.advance(p, 1)", 2),
    ],
)
def test_the_ban_finds_forbidden_calls(source: str, count: int) -> None:
    assert len(forbidden(source)) == count


def test_kernels_and_bench_are_symlinks_without_a_top_init() -> None:
    for name in ("kernels", "bench"):
        link = ROOT / "ditfast" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"
        assert link.resolve() == ROOT / name and link.is_dir()
        # with one, the folder would shadow the PyPI package of that name in the checkout
        assert not (ROOT / name / "__init__.py").exists()


def test_the_face() -> None:
    promised = {"DiT", "DiTConfig", "MODELS", "reference", "ops", "load_checkpoint", "save_checkpoint"}
    assert promised <= set(ditfast.__all__)
    assert set(ditfast.__all__) <= set(dir(ditfast))
    for name in ditfast.__all__:
        assert getattr(ditfast, name) is not None
    assert issubclass(ditfast.DiT, ditfast.reference.DiT)
    with pytest.raises(AttributeError, match="'ditfast' has no attribute 'DiTT'"):
        _ = ditfast.DiTT  # type: ignore[attr-defined]


_WITHOUT_TRITON = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("triton is blocked")

import ditfast
assert "torch" not in sys.modules, "import ditfast imports torch before anything asks for it"

import torch  # whose CUDA builds look for triton
sys.meta_path.insert(0, Blocked())
for name in ditfast.__all__:
    getattr(ditfast, name)
assert not torch.cuda.is_initialized()

from ditfast.testing.inputs import random_batch, randomize_
from ditfast.parity import judge

config = ditfast.DiTConfig(depth=2, hidden_size=72, num_heads=2, num_classes=10, latent_size=(8, 4))
fast = randomize_(ditfast.DiT(config)).eval()
reference = ditfast.reference.DiT(config).eval()
reference.load_state_dict(fast.state_dict())
x, t, y = random_batch(config, 3)
with torch.no_grad():
    ours, yardstick, oracle = fast(x, t, y), reference(x, t, y), reference.double()(x.double(), t, y)
assert judge("model", ours, yardstick, oracle, torch.float32).ok
assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
print("ok")
"""


def _fresh(script: str) -> str:
    """The output of a script in a fresh interpreter that finds ditfast where this one does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(ditfast.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.subprocess
def test_works_where_importing_triton_fails() -> None:
    assert _fresh(_WITHOUT_TRITON) == "ok"


@pytest.mark.subprocess
def test_the_face_waits_for_triton_and_dynamo() -> None:
    script = (
        "import sys, torch, ditfast; "
        "[getattr(ditfast, name) for name in ditfast.__all__ if name != 'DiTPipeline']; "  # diffusers' by name
        "print([name for name in ('triton', 'torch._dynamo', 'torch.distributed.tensor', 'diffusers') "
        "if name in sys.modules])"
    )
    # torch._dynamo takes a second to import, and imports triton; both can wait for a first compile or launch, and
    # DTensors for the first of them
    assert _fresh(script) == "[]"


@pytest.mark.subprocess
def test_import_is_light_beyond_torch() -> None:
    script = "import time, torch; start = time.perf_counter(); import ditfast; print(time.perf_counter() - start)"
    seconds = [float(_fresh(script)) for _ in range(5)]
    assert statistics.median(seconds) < 0.2, f"import ditfast takes {seconds} s beyond import torch"
