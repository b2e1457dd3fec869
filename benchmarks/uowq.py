"""UOWQ: what its weights are worth, in simulation and on PACS: `make bench-uowq ARGS="--data …"`.

`--part simulation` needs no data: Gaussian and logistic families in which the divergence is known; fails where the
closed form does not beat half and double weights outside the error. The other parts train on PACS images:

few-shot    each domain as the target with 5 to 100 training images a class, the others as sources with at most 500
half        the same at 10 images a class with half of the source images
lora        the same at 10 images a class with adapters of rank 8
overhead    processor time of the weights in percent of training on all samples
multi-task  algorithm 2: a model for each domain, all others its sources
heads       `[heads] weighting`: bundles of three domains folded in every order, heads tuned alone and with each other's
            samples; methods `none` and `uowq`

Methods: `target-only`; `all-equal`, every source sample at weight 1; `uowq-static`, weights once, after the first
epoch, which sees the target alone; `uowq-dynamic`, after every epoch. `-aic`: d is the effective dimension of the
source models, and not the number of parameters. `--plots` draws the weights as heat maps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import uowq_heads, uowq_simulation
from benchmarks.pacs import DOMAINS, Pacs
from benchmarks.report import finish, now, options, prepare_plots, say
from benchmarks.uowq_pacs import Study

PARTS = ("simulation", "few-shot", "half", "lora", "overhead", "multi-task", "heads")
SHOTS = (5, 10, 20, 100)
SOURCE_SAMPLES = 500
HELD_OUT = ("photo", "sketch")  # of `heads`
QUICK = {"shots": (10,), "targets": ("art",), "seeds": 1, "source_samples": 150}
FULL = {"shots": SHOTS, "targets": DOMAINS, "seeds": 1, "source_samples": SOURCE_SAMPLES}

Row = dict[str, Any]


def main() -> int:
    arguments = _arguments()
    torch.set_num_threads(1)
    started, rows, failed = now(), [], []
    if "simulation" in arguments.part:
        say("simulation")
        rows = list(uowq_simulation.rows(arguments.quick))
        failed = uowq_simulation.failures(rows, arguments.quick)
    jobs = _jobs(arguments)
    if jobs:
        with tempfile.TemporaryDirectory() as folder:
            study = Study(Pacs(arguments.data, arguments.base, Path(folder) / "base"), arguments.source_samples)
            for done, (name, job) in enumerate(jobs):
                say(f"{100 * done / len(jobs):3.0f} %: {name}")
                rows += _cached(
                    arguments.cache, f"{arguments.base}-{arguments.source_samples}-{name}", partial(job, study)
                )
    finish("uowq", rows, arguments.json, started)
    if arguments.plots:
        from benchmarks.uowq_plots import draw

        draw(arguments.plots, rows)
    for sentence in failed:
        say(sentence)
    return 1 if failed else 0


def _jobs(arguments: argparse.Namespace) -> list[tuple[str, Callable[[Study], list[Row]]]]:
    """Seeds outside, so that one full set of rows is there early."""
    jobs: list[tuple[str, Callable[[Study], list[Row]]]] = []
    for seed in range(arguments.seeds):
        for target in arguments.targets:
            for shots in arguments.shots:
                jobs.append((f"few-shot-{target}-{shots}-{seed}", partial(_few_shot, target, shots, seed, {})))
        for target in arguments.targets:
            jobs.append((f"half-{target}-10-{seed}", partial(_few_shot, target, 10, seed, {"half": True})))
        jobs.append((f"multi-task-{seed}", partial(_multi_task, seed)))
    for target in arguments.targets:
        jobs.append((f"overhead-{target}-10-0", partial(_overhead, target)))
        jobs.append((f"lora-{target}-10-0", partial(_few_shot, target, 10, 0, {"adapters": True})))
    for held_out in HELD_OUT[: 1 if arguments.quick else None]:
        for order in uowq_heads.orders(held_out)[: 1 if arguments.quick else None]:
            for fold in uowq_heads.FOLDS:
                job = partial(_heads, held_out, fold, order, arguments.cache)
                jobs.append((f"heads-{held_out}-{fold}-{'-'.join(order)}", job))
    return [(name, job) for name, job in jobs if name.startswith(tuple(arguments.part))]


def _few_shot(target: str, shots: int, seed: int, changes: dict[str, bool], study: Study) -> list[Row]:
    return study.few_shot(target, shots, seed, **changes)


def _multi_task(seed: int, study: Study) -> list[Row]:
    return list(study.multi_task(seed))


def _overhead(target: str, study: Study) -> list[Row]:
    return study.overhead(target, 10, 0)


def _heads(held_out: str, fold: str, order: tuple[str, ...], cache: Path | None, study: Study) -> list[Row]:
    return uowq_heads.rows(study.pacs, cache or study.pacs.bundles, held_out, fold, order)


def _cached(folder: Path | None, name: str, job: Callable[[], list[Row]]) -> list[Row]:
    if folder is None:
        return job()
    path = folder / f"uowq-{name}.json"
    if path.is_file():
        stored: list[Row] = json.loads(path.read_text())
        return stored
    rows = job()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return rows


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, help="folder of bases and images; without it, only the simulation is run")
    parser.add_argument("--base", default="cnn", help="factory in networks.py")
    parser.add_argument("--part", type=names, help=f"of {', '.join(PARTS)}; all unless told")
    parser.add_argument("--targets", type=names, help=f"of {', '.join(DOMAINS)}")
    parser.add_argument("--shots", type=lambda text: [int(n) for n in text.split(",")], help="images a class")
    parser.add_argument("--seeds", type=int, help="draws of tuning samples and orders; 1 unless told")
    parser.add_argument("--source-samples", type=int, help="of each source domain; 500 unless told")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the weights as heat maps; needs matplotlib")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep rows here and use them again; delete them after an edit"
    )
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.part is None:
        arguments.part = list(PARTS) if arguments.data else ["simulation"]
    if wrong := [part for part in arguments.part if part not in PARTS]:
        parser.error(f"there is no part {wrong[0]}; there are {', '.join(PARTS)}")
    if set(arguments.part) - {"simulation"} and arguments.data is None:
        parser.error("--data is needed for all parts but the simulation")
    prepare_plots(parser, arguments.plots, "matplotlib")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
