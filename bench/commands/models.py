"""``ditfast bench`` and ``ditfast bench models``: DiT models, the reference, its rivals and ditfast side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options

if TYPE_CHECKING:
    import torch

    from ..cases.case import Case
    from ..cases.providers import Provider
    from ..measure.runner import Runner, Settings
    from ..records.rows import ModelRow
    from ..suites.suite import Recorder

_FAILED = 1
# seconds after which the default run on a CPU compiles nothing more: it has to end within two minutes
_COMPILE_UNTIL = 50.0
_FIT_TRIES = 4


@dataclass(frozen=True)
class Plan:
    """What the options ask for."""

    cases: list[Case]
    providers: list[Provider]
    device: torch.device
    run: Settings
    settings: dict[str, Any]


def bench(
    context: typer.Context,
    model: options.Models = None,
    batch: options.Batches = None,
    dtype: options.Dtypes = None,
    mode: options.Modes = None,
    providers: options.Providers = None,
    json: options.Json = None,
    resume: options.Continue = False,
    compare: options.Compare = None,
    device: options.Device = None,
    image_size: options.ImageSizes = None,
    conditioning: options.Design = "adaln_zero",
    seconds: options.Seconds = None,
    budget: options.Budget = None,
    isolate: options.Isolation = "auto",
    plugin: options.Plugins = None,
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up",
            help="Only make the first calls, of all providers side by side, which fills the compilers' caches.",
        ),
    ] = False,
    provider_module: Annotated[
        str | None,
        typer.Option(
            help="A model of your own, before and after ditfast.accelerate: a function in a .py file or a module that "
            "returns (model, inputs).",
            show_default=False,
            metavar="PATH:FACTORY",
        ),
    ] = None,
) -> None:
    """Measure DiT models: the reference, its rivals and ditfast, each row with a parity tick.

    "ditfast bench" alone is a quick look: small models on a CPU in under two minutes, DiT-XL/2 on a GPU. "ditfast
    bench models" measures everything: on a GPU all sizes, batches and modes, on a CPU the three smallest.
    """
    if context.invoked_subcommand is not None:
        misplaced = [name for name in context.params if not _is_default(context, name)]
        if misplaced:
            options_given = ", ".join("--" + name.replace("_", "-") for name in misplaced)
            raise ValueError(f"{options_given} must come after {context.invoked_subcommand!r}, which takes the options")
        return
    if provider_module is not None:
        _own_model(context, provider_module, dtype, device, seconds)
        return
    from ...files import check_target
    from ..measure.runner import steps
    from ..records.compare import compare as compared
    from ..records.files import Results
    from ..report.terminal import comparison_table, results_table
    from ..suites.suite import run_suite

    baseline = None if compare is None else Results.load(compare, "models")
    check_target(json)
    options.check_continue(resume, json)
    plan = make_plan(
        model or (),
        batch or (),
        dtype or (),
        mode or (),
        providers,
        device,
        image_size or (),
        conditioning,
        seconds,
        isolate,
        tuple(plugin or ()),
        full=context.info_name == "models",
    )
    if warm_up:
        _warm_up(plan, resume or any(option is not None for option in (json, compare, budget, seconds)))
        return
    results = run_suite(
        "models",
        plan.device,
        plan.settings,
        lambda recorder: measure(plan, recorder),
        lambda results: [
            results_table(results),
            *([] if baseline is None else [comparison_table(compared(baseline, results), str(compare))]),
        ],
        path=json,
        steps=steps(plan.cases, plan.providers),
        precisions=_precisions(plan),
        resume=resume,
        budget=options.parse_budget(budget),
    )
    ours = [row for row in results.rows if row.is_ours]
    if any(row.status == "error" or (row.status == "ok" and row.parity is not True) for row in ours):
        raise typer.Exit(_FAILED)


def _warm_up(plan: Plan, measures: bool) -> None:
    """First calls alone; exit 1 where one fails."""
    from ...console import progress, terminated_as_interrupted
    from ..measure.runner import Runner

    if measures:
        options_of_time = "--json, --continue, --compare, --budget and --seconds"
        raise ValueError(f"--warm-up measures nothing: {options_of_time} do not go with it")
    total = len(plan.cases) * len(plan.providers)
    with terminated_as_interrupted(), progress(total) as report, Runner(plan.device, plan.run) as runner:
        failures = runner.warm_up(plan.cases, plan.providers, report)
    for sentence in failures:
        typer.echo(sentence, err=True)
    if failures:
        raise typer.Exit(_FAILED)


def _own_model(
    context: typer.Context,
    spec: str,
    dtype: list[str] | None,
    device: str | None,
    seconds: float | None,
) -> None:
    """A user's model before and after acceleration; exit 1 without parity."""
    import torch

    from ...console import print_tables
    from ...environment import parse_device
    from ..cases.case import parse_dtype
    from ..cases.factory import make_model
    from ..suites.own_model import before_after, table

    allowed = ("provider_module", "dtype", "device", "seconds")
    extra = [name for name in context.params if name not in allowed and not _is_default(context, name)]
    if extra or len(dtype or ()) > 1:
        raise ValueError("--provider-module takes --dtype (once), --device and --seconds, no other options")
    torch_device = parse_device(device)
    precision = parse_dtype(dtype[0]) if dtype else torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    budget = options.positive("--seconds", seconds, 1.0)
    report, rows = before_after(*make_model(spec), torch_device, precision, budget)
    typer.echo(f"{report}\n")
    print_tables(table(rows))
    if any(row.is_ours and row.parity is not True for row in rows):
        raise typer.Exit(_FAILED)


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is None or source.name in ("DEFAULT", "DEFAULT_MAP")


def make_plan(
    models: tuple[str, ...] | list[str],
    batches: tuple[int, ...] | list[int],
    dtypes: tuple[str, ...] | list[str],
    modes: tuple[str, ...] | list[str],
    provider_names: str | None,
    device_name: str | None,
    image_sizes: tuple[str, ...] | list[str],
    conditioning: str,
    seconds: float | None,
    isolate: str,
    plugins: tuple[str, ...],
    full: bool,
) -> Plan:
    """The options checked and completed by the device's defaults.

    Raises:
        ValueError: an option is wrong; says which, what was wanted and what came.
    """
    from ...environment import parse_device
    from ..cases.case import defaults, dtype_name, make_cases, parse_dtype, parse_mode
    from ..cases.providers import load_plugins
    from ..measure.runner import Settings

    load_plugins(plugins)
    device = parse_device(device_name)
    default = defaults(device, full)
    configs = options.named_configs(models or default.models, image_sizes or ("256",), conditioning)
    if default.large_size is not None and not image_sizes:
        smallest = [name for name in (models or default.models) if name.endswith("/2")]
        configs += options.named_configs(smallest, (default.large_size,), conditioning)
    chosen_dtypes = [parse_dtype(name) for name in dtypes] or [default.dtype]
    chosen_modes = [parse_mode(name) for name in modes] or list(default.modes)
    cases = make_cases(configs, batches or default.batches, chosen_dtypes, chosen_modes)
    chosen = options.chosen_providers(provider_names, default.providers, cases, device)
    names = [provider.name for provider in chosen]
    if device.type == "cpu" and not (full or provider_names or models or batches):
        deadline = time.monotonic() + _COMPILE_UNTIL
        chosen = [_until(provider, deadline) if "compile" in provider.name else provider for provider in chosen]
    run = Settings(
        seconds=options.positive("--seconds", seconds, default.seconds),
        isolate=isolate,  # type: ignore[arg-type]
        plugins=plugins,
    )
    settings = {
        "device": str(device),
        "models": list(dict.fromkeys(config.name for config in configs)),
        "batches": sorted({case.batch for case in cases}),
        "dtypes": list(dict.fromkeys(map(dtype_name, chosen_dtypes))),
        "modes": list(dict.fromkeys(chosen_modes)),
        "latent_sizes": list(dict.fromkeys(config.latent_hw for config in configs)),
        "conditioning": conditioning,
        "providers": names,
        "providers_left_out": {} if provider_names is not None else _left_out(names, cases[0], device),
        "seconds": run.seconds,
        "seed": run.seed,
        "isolate": isolate,
        "plugins": list(plugins),
    }
    return Plan(cases, chosen, device, run, settings)


def measure(plan: Plan, recorder: Recorder) -> None:
    """Every case of the plan that no earlier part has; where a batch does not fit, the largest one that does."""
    from ..measure.preparing import blank_row
    from ..measure.runner import Runner

    with Runner(plan.device, plan.run) as runner:
        for case in plan.cases:
            blanks = [blank_row(case, provider) for provider in plan.providers]
            if recorder.has(blank.key for blank in blanks):
                for _ in range(len(plan.providers) + 1):
                    recorder.report(f"{case.label}: measured before")
            elif recorder.out_of_time():
                return
            else:
                _measure_case(plan, case, runner, recorder)
            measured = [row for row in recorder.results.rows if row.series == blanks[0].series]
            short = any(row.batch == case.batch and row.status == "oom" for row in measured)
            fitted = {row.batch for row in measured if _in_place_of(case) in row.note}
            if short and not fitted:
                _measure_fitting(plan, case, runner, recorder)
            for batch in sorted(fitted):  # one that was cut: it had not come to all providers
                instead = replace(case, batch=batch)
                complete = recorder.has(blank_row(instead, provider).key for provider in plan.providers)
                if not complete and not recorder.out_of_time():
                    _measure_case(plan, instead, runner, recorder, _in_place_of(case))


def _measure_case(plan: Plan, case: Case, runner: Runner, recorder: Recorder, note: str = "") -> list[ModelRow]:
    """Measures every provider on a case and returns the rows, which are saved whenever another one has been timed."""
    from ..measure.preparing import blank_row
    from ..records.metrics import with_shares

    def noted(rows: list[ModelRow]) -> list[ModelRow]:
        return [replace(row, note="; ".join(filter(None, (row.note, note)))) if row.ms else row for row in rows]

    recorder.set_aside(blank_row(case, provider).key for provider in plan.providers)
    saves = recorder.path is not None
    rows = noted(
        runner.rows(
            case,
            plan.providers,
            recorder.report,
            recorder.out_of_time,
            (lambda rows: recorder.add(noted(rows), with_shares, so_far=True)) if saves else None,
        )
    )
    recorder.add(rows, with_shares)
    return rows


def _measure_fitting(plan: Plan, case: Case, runner: Runner, recorder: Recorder) -> None:
    """Measures the largest batch at which everybody who ran at a smaller one still fits, and says so in its rows."""
    from ..measure.fitting import device_bytes, guess_batch
    from ..measure.preparing import blank_row

    limit = device_bytes(plan.device)
    high = case.batch
    series = blank_row(case, plan.providers[0]).series
    for _ in range(_FIT_TRIES):
        measured = [row for row in recorder.results.rows if row.series == series]
        short = {row.provider for row in measured if row.status == "oom" and row.batch == high}
        guesses = []
        for provider in short:
            fit = [(row.batch, row.peak_bytes) for row in measured if row.provider == provider and row.peak_bytes]
            low = max((batch for batch, _ in fit), default=0)
            guesses.append(guess_batch(fit, limit, low, high))
        if not guesses or any(guess is None for guess in guesses):
            return
        high = min(guess for guess in guesses if guess is not None)
        if recorder.out_of_time():
            return
        rows = _measure_case(plan, replace(case, batch=high), runner, recorder, _in_place_of(case))
        if not any(row.status == "oom" for row in rows):
            return


def _in_place_of(case: Case) -> str:
    return f"in place of batch {case.batch}, which does not fit"


def _precisions(plan: Plan) -> list[str]:
    """The matmuls whose rates the rows are held against."""
    from ..cases.case import DTYPES

    # a precision that torch.mm does not have, such as a plugin's fp8, has no measured limit and no share
    measurable = {*DTYPES, *(("tf32",) if plan.device.type == "cuda" else ())}
    names = [*plan.settings["dtypes"], *(provider.precision for provider in plan.providers)]
    return [name for name in dict.fromkeys(names) if name in measurable]


def _until(provider: Provider, deadline: float) -> Provider:
    """The provider, unavailable to cases that begin after the deadline."""

    def unavailable(case: Case, device: torch.device) -> str | None:
        if time.monotonic() > deadline:
            return f"left out so that the default run stays under two minutes; --providers {provider.name} runs it"
        return provider.unavailable(case, device)

    return replace(provider, unavailable=unavailable)


def _left_out(names: list[str], case: Case, device: torch.device) -> dict[str, str]:
    """Why the default leaves out each provider that it does."""
    from ..cases.providers import PROVIDERS

    ask = f"left out by default on a {'GPU' if device.type == 'cuda' else 'CPU'}; --providers {{}} runs it"
    left_out = [provider for provider in PROVIDERS.values() if provider.name not in names]
    return {provider.name: provider.unavailable(case, device) or ask.format(provider.name) for provider in left_out}
