"""The page's style and its definitions."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --text: #1b1b1b; --quiet: #555555; --page: #ffffff; --band: #f4f5f7; --line: #d4d7dc;
  --good: #00603a; --bad: #a30000; --link: #004f9e; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --quiet: #b4b8c0; --page: #15171b; --band: #20242a;
  --line: #3b414b; --good: #7fdcae; --bad: #ff9d92; --link: #8cc4ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1160px; padding: 16px; color: var(--text); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin-top: 2.4rem; } h3 { font-size: 1.05rem; }
h2, h3 { line-height: 1.3; } a { color: var(--link); }
nav a { display: inline-block; margin: 0 1rem 0.3rem 0; }
.note, figcaption, .quiet { color: var(--quiet); } .good { color: var(--good); }
.bad { color: var(--bad); font-weight: 600; }
.scroll { overflow-x: auto; max-width: 100%; } .scroll:focus-visible { outline: 2px solid var(--link); }
figure { margin: 1rem 0 1.8rem; } figure img { display: block; max-width: none; height: auto; background: #ffffff; }
figcaption { font-size: 0.875rem; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.35; }
th, td { padding: 4px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { background: var(--band); } td { overflow-wrap: normal; white-space: nowrap; }
th { white-space: nowrap; } td.long { white-space: normal; min-width: 16rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: 4px 16px; }
dt { font-weight: 600; } dd { margin: 0; }
details { margin: 0.8rem 0; } summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
@media (max-width: 600px) { body { padding: 12px; } dl { grid-template-columns: 1fr; } dd { margin-bottom: 8px; } }
"""

DEFINITIONS = (
    ("images/s", "The batch over the median time of a call. Guided: images, not rows of the doubled batch."),
    (
        "ms, quartiles",
        "Median and quartiles over interleaved samples of a call with rotating inputs; first calls apart.",
    ),
    (
        "TFLOP/s",
        "The reference's FLOPs, counted from shapes, over the median time, for every provider alike.",
    ),
    (
        "of limit",
        "The larger of two shares: TFLOP/s of the matmul measured in the same run, and reading the weights once "
        "of the copy measured in the same run. Operators: of the copy or the matmul, as their unit says.",
    ),
    ("memory, peak", "The most that was allocated at once by the provider on its own, weights included."),
    ("saved for backward", "What the forward keeps for the backward: unique storages, parameters left out."),
    ("first call", "Compilation and capture included."),
    (
        "error, bound, parity",
        "The error against the reference in fp64, and the bound that follows from eager PyTorch's own error in the "
        "dtype. The tick: the error is within the bound.",
    ),
    (
        "speed-up",
        "Over the fastest rival that ran in the same case of the same run; stated only beside a parity tick.",
    ),
    (
        "noise, a tie",
        "How far the reference timed twice lay apart, and at least twice the standard error of its median; a "
        "difference no larger than that is a tie.",
    ),
    (
        "rival",
        "Every provider that is not ditfast: eager, torch.compile in its modes, diffusers where installed.",
    ),
    (
        "regression",
        "A row of ditfast slower than in the older run by more than the noise of either, with quartiles that do not "
        "overlap; one that no longer runs; or one that lost its parity tick.",
    ),
    (
        "exponent",
        "Of time = factor * value ^ exponent, by least squares in log-log; r² is 1 for a perfect fit. None is stated "
        "below 0.95, nor of fewer than three points.",
    ),
    ("computed", "Traced on meta tensors and divided by datasheet rates: a bound, not a measurement."),
)
