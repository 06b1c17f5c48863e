"""The options that the suites' commands share, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from ditfast.config import DiTConfig

    from .cases.case import Case
    from .cases.providers import Provider

Models = Annotated[
    list[str] | None, typer.Option("--model", help="A named model, e.g. DiT-XL/2; may be repeated.", show_default=False)
]
Batches = Annotated[
    list[int] | None, typer.Option("--batch", help="Images in a batch; may be repeated.", show_default=False)
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(
        "--dtype", help="fp32, bf16 or fp16; may be repeated. bf16 on a GPU, else fp32.", show_default=False
    ),
]
Modes = Annotated[
    list[str] | None,
    typer.Option(
        "--mode",
        help="forward, cfg (guided), train (loss, backward, AdamW) or train-checkpoint (with activation "
        "checkpointing); may be repeated.",
        show_default=False,
    ),
]
ImageSizes = Annotated[
    list[str] | None,
    typer.Option("--image-size", help="Pixels, SIZE or HEIGHTxWIDTH; may be repeated.", show_default=False),
]
Design = Annotated[
    Literal["in_context", "cross_attention", "adaln", "adaln_zero"],
    typer.Option("--conditioning", help="The block design."),
]
Providers = Annotated[
    str | None,
    typer.Option("--providers", help="Who runs, by commas, e.g. reference,ditfast.", show_default=False),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", help="A module or .py file that registers providers; may be repeated.", show_default=False
    ),
]
Isolation = Annotated[
    Literal["auto", "all", "none"],
    typer.Option("--isolate", help="Who runs in a process of its own; auto: on a GPU, all that compile or capture."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda or cuda:N. By default cuda where there is one.", show_default=False),
]
Seconds = Annotated[
    float | None,
    typer.Option("--seconds", help="Time for each provider in each case. 1 by default.", show_default=False),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write the results here, after every row.", show_default=False, metavar="FILE"),
]
Continue = Annotated[
    bool, typer.Option("--continue", help="Go on with the --json file: what it has is not measured again.")
]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="Begin nothing more after this long, e.g. 90s, 9m, 1h.", show_default=False),
]
Compare = Annotated[
    Path | None,
    typer.Option("--compare", help="Compare with an older --json file.", show_default=False, metavar="OLD.json"),
]


def positive(option: str, value: float | None, default: float) -> float:
    """The value, or the default.

    Raises:
        ValueError: not above 0.
    """
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"{option} must be above 0, got {value}")
    return default if value is None else value


def parse_budget(text: str | None) -> float | None:
    """Seconds of "90", "90s", "9m" or "1.5h".

    Raises:
        ValueError: anything else.
    """
    if text is None:
        return None
    number, factor = text.strip().lower(), 1.0
    for suffix, seconds in (("s", 1.0), ("m", 60.0), ("h", 3600.0)):
        if number.endswith(suffix):
            number, factor = number[:-1], seconds
            break
    try:
        value = float(number) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise ValueError(f"--budget must look like 90s, 9m or 1h, got {text!r}")
    return value


def check_continue(resume: bool, path: Path | None) -> None:
    """Raises a ValueError where there is no file to go on with."""
    if resume and path is None:
        raise ValueError("--continue needs --json FILE, the file to go on with")


def named_configs(names: Sequence[str], sizes: Sequence[str], conditioning: str) -> list[DiTConfig]:
    """Every model at every image size.

    Raises:
        ValueError: an unknown name, with the nearest; a size that does not fit.
    """
    from ditfast.config import MODELS, DiTConfig

    from .cases.case import parse_image_size, unknown

    for name in names:
        if name not in MODELS:
            raise ValueError(unknown("model", name, MODELS))
    pixels = [parse_image_size(size) for size in sizes]
    return [
        DiTConfig.named(name, image_size=size, conditioning=conditioning)
        for size in dict.fromkeys(pixels)
        for name in dict.fromkeys(names)
    ]


def listed(names: str | None, default: Iterable[str]) -> list[str]:
    """The names of an option that takes them by commas, each once; the default ones where it is not given."""
    items = default if names is None else names.split(",")
    return list(dict.fromkeys(name.strip() for name in items if name.strip()))


def chosen_providers(
    names: str | None, default: Iterable[str], cases: Sequence[Case], device: torch.device
) -> list[Provider]:
    """The providers by name, or the default ones.

    Raises:
        ValueError: an unknown name, with the nearest; none that can run the first case here, with the reasons.
    """
    from .cases.providers import PROVIDERS, get_provider

    requested = listed(names, default)
    if not requested:
        raise ValueError(f"--providers must name at least one of {', '.join(PROVIDERS)}, got {names!r}")
    chosen = [get_provider(name) for name in requested]
    reasons = {provider.name: provider.unavailable(cases[0], device) for provider in chosen}
    if all(provider.unavailable(case, device) for provider in chosen for case in cases):
        listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"none of the providers can run {cases[0].label} on {device}: {listing}")
    return chosen
