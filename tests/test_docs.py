"""README, CONTRIBUTING and docs/: every command and Python block runs or says why not; links and options exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import ditfast
from ditfast import config
from ditfast.bench.cases.providers import PROVIDERS
from ditfast.cli.command import app
from ditfast.testing.inputs import randomize_
from tests.adapters.foreign_models import Model, inputs

ROOT = Path(__file__).resolve().parents[1]
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md"))]
CHECKPOINT, AUTOENCODER, PIPELINE = "DiT-XL-2-256x256.pt", "sd-vae-ft-mse", "DiT-XL-2-256"
SAMPLE = f"ditfast sample --checkpoint {CHECKPOINT} --vae {AUTOENCODER}"

# command -> what is added to make it small; the last of an option given twice counts
RUN = {
    "ditfast info": "",
    "ditfast info --attention 256x16x72": "",
    "ditfast explain my_model.py:make": "",
    f"ditfast convert {CHECKPOINT} xl2.safetensors --to safetensors": "",
    f"{SAMPLE} --class-names golden retriever, otter --out images": "--steps 2 --num 2 --device cpu",
    f"{SAMPLE} --num 50000 --cfg-scale 1.5 --npz samples.npz": "--steps 2 --num 2 --device cpu",
    "ditfast tune --model DiT-XL/2 --budget 10m": "--dry-run --batch 1",
}

_ENVIRONMENT = "changes the environment; "
_MINUTES = "takes minutes; "
_CAMPAIGN = "needs a GPU; tests/campaign/test_plan.py rehearses the whole plan, cut and gone on with from its archive"
_WARM = "compiles hundreds of kernels; tests/warm/test_warm.py compiles, packs and unpacks a few"
_PYTEST_BENCH = _MINUTES + "tests/bench/test_host.py runs every suite once, untimed"
# command -> why it is not run here, and what runs it instead
EXCUSED = {
    "pip install .": _ENVIRONMENT + "tests/test_packaging.py installs the wheel",
    "pip install -c constraints.txt .": _ENVIRONMENT + "tests/test_packaging.py installs the wheel",
    "pip install .[diffusers]": _ENVIRONMENT + "tests/test_packaging.py holds the extras",
    "pip install .[evaluate]": _ENVIRONMENT + "tests/test_packaging.py holds the extras",
    ".venv/bin/pre-commit install": _ENVIRONMENT + "writes git's hooks",
    "make env": _ENVIRONMENT + "is the first step of CI (.ci/run)",
    "make test": "runs this test",
    "make quick": "runs tests of this suite",
    "make test-long": "takes long; runs tests of this suite",
    "make gpu-stack": _ENVIRONMENT + "is a step of CI (.ci/run)",
    "make bench": _MINUTES + "tests/bench/test_command.py runs the command that it is",
    "make sample": "tests/test_examples.py runs the script that it is",
    "ditfast bench": _MINUTES + "tests/bench/test_command.py runs it with small options",
    "ditfast bench --provider-module my_model.py:make": (
        "compiles the model; tests/bench/test_own_model.py runs the command"
    ),
    "ditfast bench --plugin my_rival.py --providers reference-compile,ditfast,mine": (
        "compiles a model; tests/bench/test_isolation.py runs a plugin, and this one's provider"
    ),
    "ditfast verify": _MINUTES + "tests/prove/test_verify.py runs it on a few checks",
    "ditfast verify --json rows.json": _MINUTES + "tests/prove/test_verify.py runs it on a few checks",
    "ditfast verify --json rows.json --continue": _MINUTES + "tests/prove/test_verify.py runs it on a few checks",
    "ditfast kernels": _MINUTES + "tests/kernels/test_aot.py compiles what it compiles",
    "ditfast rehearse": _MINUTES + "tests/kernels/test_rehearsal.py rehearses its parts; CI runs it by make gpu-stack",
    "ditfast evaluate --npz samples.npz --reference VIRTUAL_imagenet256_labeled.npz": (
        "needs Inception's weights; tests/evaluation/test_command.py runs it with another network"
    ),
    "torchrun --nproc-per-node 2 examples/fsdp2_training.py": "tests/test_examples.py runs it",
    "torchrun --nproc-per-node 8 -m ditfast sample --num-images 50000 "
    f"--checkpoint {CHECKPOINT} --vae {AUTOENCODER} --npz samples.npz": (
        "tests/sampling/test_processes.py runs two processes"
    ),
    "ditfast warm --arch sm_90 --archive xl.tar.xz": _WARM,
    "ditfast warm --arch sm_90 --for verify,bench,tune --model DiT-XL/2 --cache cache/ --archive all.tar.xz": _WARM,
    "ditfast warm --arch sm_90 --for verify,bench --archive kernels.tar.xz": _WARM,
    "ditfast warm --unpack xl.tar.xz": _WARM,
    "ditfast bench campaign --rehearse --out plan": _MINUTES + "tests/campaign/test_plan.py runs it",
    "ditfast bench campaign --out visit --budget 8m --cache kernels.tar.xz": _CAMPAIGN,
    "ditfast bench campaign --out again --budget 8m --resume results.tar.xz "
    "--cache triton-cache.tar.xz --cache inductor-cache.tar.xz": _CAMPAIGN,
    "pytest bench --benchmark-json out.json": _PYTEST_BENCH,
    "pytest bench --benchmark-save before": _PYTEST_BENCH,
    "pytest bench --benchmark-compare": _PYTEST_BENCH,
}
# words of a Python block -> why it is not run here
EXCUSED_BLOCKS = {
    "fully_shard(model)": "needs process groups; tests/test_examples.py runs examples/fsdp2_training.py",
    "register_adapter(RmsBlockAdapter())": "tests/adapters/test_codebases.py runs it on blocks of its own",
}
# what makes a Python block small
SMALLER = {"steps=250": "steps=2", "num_inference_steps=50": "num_inference_steps=2"}
# options of other commands
FOREIGN = {"--extra-index-url", "--strict"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The command lines of a page, without comments and quotes."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [" ".join(words) for line in lines if (words := shlex.split(line, comments=True))]


def spans(page: Path) -> list[str]:
    """What stands in backquotes outside of blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.M))


@pytest.mark.quick
def test_every_command_is_run_or_excused() -> None:
    assert not set(RUN) & set(EXCUSED)
    found = {command for page in PAGES for command in commands(page)}
    assert found - {*RUN, *EXCUSED} == set(), "run it or say why it cannot be run"
    assert {*RUN, *EXCUSED} - found == set(), "stands on no page any more"
    for reason in (*EXCUSED.values(), *EXCUSED_BLOCKS.values()):
        for name in re.findall(r"(?:tests|examples)/[\w/]+\.py|\.ci/run", reason):
            assert (ROOT / name).exists(), reason


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small random files under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on busy cores take many times as long for so little
    torch.manual_seed(0)
    ditfast.save_checkpoint(randomize_(ditfast.DiT(ditfast.DiTConfig.named("DiT-S/8"))), folder / CHECKPOINT)
    (folder / "my_model.py").write_text(
        "from tests.adapters.foreign_models import Model, inputs\n\ndef make():\n    return Model(depth=1), inputs()\n"
    )
    if importlib.util.find_spec("diffusers"):
        import diffusers

        from tests.adapters.diffusers_models import transformer
        from tests.sampling.conftest import make_autoencoder

        make_autoencoder(folder / AUTOENCODER)
        model = transformer(num_embeds_ada_norm=1000, norm_eps=1e-5)
        autoencoder = diffusers.AutoencoderKL.from_pretrained(folder / AUTOENCODER)
        diffusers.DiTPipeline(model, autoencoder, diffusers.DDIMScheduler()).save_pretrained(folder / PIPELINE)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def place(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory; a provider that is registered is forgotten."""
    monkeypatch.chdir(stand_ins)
    monkeypatch.syspath_prepend(str(ROOT))
    yield stand_ins
    PROVIDERS.pop("mine", None)


def written_out(command: str) -> list[str]:
    """Its words as they stand on a page, quotes honoured."""
    lines = (line for page in PAGES for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines())
    return next(words for line in lines if " ".join(words := shlex.split(line, comments=True)) == command)


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command: str, place: Path) -> None:
    if AUTOENCODER in command:
        pytest.importorskip("diffusers", reason="needs the package diffusers")
    result = CliRunner().invoke(app, [*written_out(command)[1:], *RUN[command].split()])
    assert result.exit_code == 0, result.output
    for name in ("xl2.safetensors", "images", "samples.npz"):
        assert name not in command.split() or (place / name).exists()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=str)
def test_the_python_blocks_of_a_page_run(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, in one namespace."""
    if page.name == "models.md":
        small = {n: replace(m, depth=2, hidden_size=m.hidden_size // 16, num_heads=2) for n, m in config.MODELS.items()}
        monkeypatch.setattr(config, "MODELS", small)
    namespace: dict[str, Any] = {"model": Model(depth=1), "inputs": inputs(), "MyDiT": ditfast.reference.DiT}
    for block in blocks(page, "python"):
        if any(words in block for words in EXCUSED_BLOCKS):
            continue
        if PIPELINE + '"' in block:
            pytest.importorskip("diffusers", reason="needs the package diffusers")
        for large, small_text in SMALLER.items():
            block = block.replace(large, small_text)
        exec(compile(block, str(page), "exec"), namespace)
    checks = {
        "README.md": lambda: namespace["output"].shape == (2, 8, 32, 32) and namespace["output"].abs().sum() > 0,
        "accelerate.md": lambda: "accelerated" in str(namespace["report"]),
        "models.md": lambda: namespace["output"].shape == (3, 8, 32, 64),
        "operators.md": lambda: torch.equal(namespace["out"], namespace["formula"]),
        "sampling.md": lambda: namespace["latents"].isfinite().all() and len(namespace["images"]) == 2,
        "training.md": lambda: namespace["loss"].isfinite().all(),
        "checkpoints.md": lambda: Path("xl2.safetensors").exists(),
    }
    assert checks.get(page.name, lambda: True)()


def test_excused_blocks_are_there() -> None:
    everything = [block for page in PAGES for block in blocks(page, "python")]
    for words in EXCUSED_BLOCKS:
        assert any(words in block for block in everything), words


def options_of(words: list[str]) -> tuple[str, set[str]]:
    """The command of ``ditfast`` that a line names, and its options."""
    command: Any = typer.main.get_command(app)
    for word in words:
        if word not in getattr(command, "commands", ()):
            break
        command = command.commands[word]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return str(command.name), options


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_and_options_exist(page: Path) -> None:
    """Of every line and every span; a lone option is of a command that the page names."""
    lines = [*commands(page), *spans(page)]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    on_page: set[str] = {"--num-images"}
    for line in lines:
        words = line.split()
        if words[0] == "make":
            assert targets.issuperset(words[1:2]), line
        if "ditfast" not in words[:5] or words[0] not in ("ditfast", "python", "torchrun"):
            continue
        command, options = options_of(rest := words[words.index("ditfast") + 1 :])
        on_page |= options
        if rest and not rest[0].startswith("-"):
            assert command in rest, line
        unknown = {word for word in rest if word.startswith("--")} - options - {"--help", "--version"}
        assert not unknown, f"{page}: `{line}` has no {unknown}"
    loose = {span.split()[0] for span in spans(page) if span.startswith("--")}
    assert loose <= on_page | FOREIGN, f"{page}: {loose - on_page - FOREIGN}"


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.quick
@pytest.mark.parametrize("page", [*PAGES, Path("kernels/README.md"), Path("CHANGELOG.md")], ids=str)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target}"
    if page.name != "CHANGELOG.md":  # which tells of what was
        for span in spans(page):
            if re.fullmatch(r"(ditfast|kernels|bench|tests|examples|docs)/[\w./-]*", span):
                assert (ROOT / span).exists(), f"{page}: {span}"


@pytest.mark.quick
def test_the_readme_is_short_and_links_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    for page in PAGES[1:]:
        assert f"]({page.as_posix()}" in text, page
