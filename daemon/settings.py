"""The typed configuration: what `config.toml` may say, with defaults, units and limits.

`config.toml` in the repository is the commented reference; a test holds it against these defaults. Seconds and
bytes stand in the key names. Paths are relative to the configuration file.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from foldd.core.bundle import MAX_BUNDLE_BYTES
from foldd.daemon.bus.settings import BusSettings

Seconds = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0)]
Weight = Annotated[float, Meta(ge=0)]
# A method's table is called as the method is, with a hyphen that no field name can have.
METHOD_TABLES = {"otmf_paper": "otmf-paper", "task_arithmetic": "task-arithmetic", "tsv_m": "tsv-m"}


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    directory: str = "state"


class BaseNetwork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Read by `foldd init` only."""

    model: str = ""
    weights: str = ""
    input_shape: tuple[Positive, ...] = ()
    features: str = ""
    head: str = ""


class TaskArithmetic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    scaling: Rate = 0.3


class OtmfPaper(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As published; the names are those of foldd.fusion.otmf_paper.OtmfPaper."""

    alpha: Share = 0.8
    steps: Count = 100
    batch: Positive = 16
    learning_rate: Rate = 0.01
    blur: Rate = 0.05


class Otmf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What foldd ships; the names are those of foldd.fusion.otmf.Otmf."""

    incoming: Rate = 0.07
    incoming_convolution: Rate = 0.6
    previous: Weight = 1.0
    student: Share = 0.5
    damping: Annotated[float, Meta(gt=0, le=1)] = 0.1
    drift: Share = 0.2
    ridge: Rate = 1e-3


class Dare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    drop: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    scaling: Rate = 0.3


class Lore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    share: Share = 0.2
    scaling: Rate = 1.0


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    threshold: Literal["paper", "code", "diagonal"] = "paper"


class Opcm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    alpha: Share = 0.5


class Nufilt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rank_previous: Positive = 128
    rank_new: Positive = 8
    lora_rank: Positive = 64
    steps: Count = 50
    learning_rate: Rate = 1e-3


class Ties(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    density: Annotated[float, Meta(gt=0, le=1)] = 0.2
    scaling: Rate = 0.5
    adds: bool = True


class TsvM(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    alpha: Rate = 1.0
    by_count: bool = False


class Uowq(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dimension: Weight = 0.0


DataFree = Literal["average", "dare", "lore", "magmax", "nufilt", "opcm", "score", "task-arithmetic", "ties", "tsv-m"]
Method = Literal[
    "otmf", "otmf-paper", "average", "dare", "lore", "magmax", "nufilt", "opcm", "score", "task-arithmetic", "ties",
    "tsv-m", "uowq",
]  # fmt: skip


class Fold(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=METHOD_TABLES):
    method: Method = "otmf"
    data_free_method: DataFree = "average"
    seed: Count = 0
    threads: Count = 0
    otmf: Otmf = Otmf()
    otmf_paper: OtmfPaper = OtmfPaper()
    dare: Dare = Dare()
    lore: Lore = Lore()
    nufilt: Nufilt = Nufilt()
    opcm: Opcm = Opcm()
    score: Score = Score()
    task_arithmetic: TaskArithmetic = TaskArithmetic()
    ties: Ties = Ties()
    tsv_m: TsvM = TsvM()
    uowq: Uowq = Uowq()


class Heads(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to heads after a fold; the names are those of foldd.fusion.alignment.Alignment."""

    mode: Literal["frozen", "aligned", "tuned"] = "aligned"
    pull: Rate = 96.0
    drift: Share = 0.2
    labels: Weight = 0.2
    weighting: Literal["none", "uowq"] = "none"


class Quantize(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["float", "w8a8", "w4a8", "w8", "w4"] = "w8a8"
    effort: Literal["fast", "paper"] | Annotated[float, Meta(gt=0)] = "fast"
    state: Literal["float", "quantized"] = "float"


class Intake(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    settle_seconds: Seconds = 2.0
    rescan_seconds: Annotated[float, Meta(ge=0.1)] = 30.0
    incomplete_seconds: Seconds = 300.0
    max_bundle_bytes: Annotated[int, Meta(ge=1, le=MAX_BUNDLE_BYTES)] = MAX_BUNDLE_BYTES
    watch: bool = True


class Worker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    attempts: Positive = 3
    memory_bytes: Count = 0
    fold_seconds: Seconds = 3600.0
    stall_seconds: Seconds = 600.0


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    change: Weight = 10.0
    parity: Rate = 1e-4
    agreement: Share = 0.9
    conflict: Share = 0.5
    on_conflict: Literal["fold", "hold", "refuse"] = "fold"


class Retention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    generations: Annotated[int, Meta(ge=2)] = 3
    quarantine_bytes: Count = 2 * MAX_BUNDLE_BYTES


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of `config.toml`."""

    state: State = State()
    base: BaseNetwork = BaseNetwork()
    fold: Fold = Fold()
    heads: Heads = Heads()
    quantize: Quantize = Quantize()
    intake: Intake = Intake()
    worker: Worker = Worker()
    gate: Gate = Gate()
    retention: Retention = Retention()
    bus: BusSettings = BusSettings()
    log: Log = Log()
