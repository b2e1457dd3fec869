"""Models that are quantized each by itself and merged as integers: the paper's tables 2 and 3, figure 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.quant_models import Cache, Subject, Subjects, quantizer
from benchmarks.report import say
from foldd.core.quantized import QuantizedModel
from foldd.quantize.hdrq import Hdrq
from foldd.quantize.merge import merge_models
from foldd.quantize.rounding import Nearest, Noise, Rounding, Stochastic

ROUNDINGS: dict[str, Rounding] = {
    "equation-11": Nearest(),
    "equation-12": Noise(everywhere=True),
    "ties": Noise(),
    "stochastic": Stochastic(),
}


def harmonic(shares: Sequence[float]) -> float:
    return len(shares) / sum(1 / max(share, 1e-9) for share in shares)


def merged_scores(
    subjects: Subjects,
    models: Sequence[Subject],
    how: Hdrq,
    widest: bool,
    draw: int,
    cache: Cache,
    facts: dict[str, Any],
) -> dict[str, list[float]]:
    """`<count> <rounding>` → accuracy of the merge of the first so many models on each one's images; `alone`: of each
    quantized model on its own."""

    def measure() -> dict[str, list[float]]:
        quantized: list[QuantizedModel] = [
            subjects.quantize(how, model, subjects.draw(model, draw), draw, widest=widest) for model in models
        ]
        scores = {
            "alone": [float(subjects.hits(q, m).mean()) for q, m in zip(quantized, models, strict=True)],
        }
        for count in range(2, len(models) + 1):
            for name, rounding in ROUNDINGS.items():
                merged = merge_models(quantized[:count], [1 / count] * count, rounding, seed=draw)
                scores[f"{count} {name}"] = [float(subjects.hits(merged, model).mean()) for model in models[:count]]
        return scores

    result: dict[str, list[float]] = cache.get({**facts, "draw": draw}, measure)
    return result


def float_score(subjects: Subjects, models: Sequence[Subject]) -> float:
    """Harmonic mean of the float average."""
    mean = {name: sum(m.weights[name] for m in models) / len(models) for name in models[0].weights}  # type: ignore[misc]
    return harmonic([float(subjects.float_hits(mean, model).mean()) for model in models])


def merged_rows(
    subjects: Subjects,
    models: Sequence[Subject],
    methods: Sequence[str],
    bits: Sequence[str],
    draws: int,
    iterations: int,
    cache: Cache,
) -> Iterator[dict[str, Any]]:
    """One row for each method, bits and rounding; `accuracy` is the harmonic mean over domains, then over draws."""
    common = {"base": subjects.bench.name, "models": [m.name for m in models], "iterations": iterations}
    for count in range(2, len(models) + 1):
        yield {
            "base": subjects.bench.name, "method": "float", "bits": "float", "merged": f"{count} average",
            "accuracy": float_score(subjects, models[:count]), "draws": 1,
        }  # fmt: skip
    for done, width in enumerate(bits):
        reference: dict[str, list[float]] = {}
        for number, method in enumerate(methods, done * len(methods)):
            say(f"  {100 * number / (len(bits) * len(methods)):.0f} %: {method} {width}, {draws} draws")
            how, widest = quantizer(method, width, iterations)
            facts = {**common, "part": "merged", "method": method, "bits": width, "split": subjects.bench.split}
            runs = [merged_scores(subjects, models, how, widest, d, cache, facts) for d in range(draws)]
            for rounding in runs[0]:
                values = [harmonic(run[rounding]) for run in runs]
                row = {
                    "base": subjects.bench.name, "method": method, "bits": width,
                    "merged": None if rounding == "alone" else rounding,
                    "accuracy": float(np.mean(values)), "accuracy_std": float(np.std(values)), "draws": draws,
                }  # fmt: skip
                if method == "qdrop":
                    reference[rounding] = values
                elif rounding in reference:
                    row |= paired(values, reference[rounding])
                yield row


def paired(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Difference to QDrop on the same draws, with its 95 % interval (Student's t)."""
    from scipy.stats import t

    differences = np.subtract(values, reference)
    half = float("nan")
    if len(differences) > 1:
        half = float(t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences)))
    mean = float(differences.mean())
    return {"difference": mean, "low": mean - half, "high": mean + half}
