"""Accuracy as an `evaluate.Metric` of our own, for where no hub can be reached.

`evaluate.load("accuracy")` fetches the metric's code from the hub at run time. This one gives the same answer from the
same call: `Accuracy().compute(predictions=..., references=...)` is `{"accuracy": share}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Share of the predicted classes that equal the reference classes, from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the predicted classes that equal the reference classes, from 0 to 1.",
            citation="",
            inputs_description="predictions: predicted class numbers; references: true class numbers.",
            features=datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def load_accuracy(hub: bool) -> evaluate.EvaluationModule:
    """The hub's accuracy metric if `hub`, else ours; ours too when the hub is wanted but can't be reached."""
    if hub:
        try:
            return evaluate.load("accuracy")
        except (FileNotFoundError, ConnectionError):
            print("The hub's accuracy metric can't be reached; examples/class_accuracy.py computes the same.")
    return Accuracy()


def metrics(hub: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's `compute_metrics` for a classifier, by `load_accuracy`."""
    metric = load_accuracy(hub)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        found = metric.compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)
        return {"accuracy": found["accuracy"]}

    return compute_metrics
