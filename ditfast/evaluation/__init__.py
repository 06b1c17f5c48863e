"""Metrics of samples: FID, sFID, Inception Score, precision and recall, as ADM's evaluation suite defines them."""

from .evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
