"""What supervisor and worker tell each other: one JSON object a line, over two pipes.

The supervisor sends a `Job`; the worker answers with any number of `Progress` and then one `Staged` or `Failed`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from foldd.core.manifest import ArtifactEntry


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that decides a fold's bytes; written to the ledger before the work.

    Fields with a default are younger than the first ledgers: a plan from before an upgrade still counts.
    """

    method: str
    options: dict[str, Any]
    data_free_method: str
    data_free_options: dict[str, Any]
    seed: int
    threads: int
    parity: float
    conflict: float
    on_conflict: str
    heads: Literal["frozen", "aligned", "tuned"] = "frozen"
    head_options: dict[str, Any] = {}
    format: str = "float"  # of the artifact
    quantizer: str = "hdrq"  # or "hdrq-paper"
    iterations: int = 0  # of reconstruction, a block
    state: str = "float"  # or "quantized": how the merged vector is kept
    agreement: float = 0.0
    change: float = 0.0  # no limit
    config_digest: str


class Job(msgspec.Struct, frozen=True, tag="job"):
    """Fold this checkpoint onto that state."""

    arrival: int
    sha256: str
    file: str
    name: str  # as it was dropped: a plain checkpoint's task
    plan: Plan
    generation: int  # the number to build
    parent: int | None
    state_sha256: str | None  # of the merge state to fold onto; None for the first


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The worker has imported everything and waits for jobs."""

    rss_bytes: int


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    stage: str
    fraction: float  # of the whole job, 0…1
    task: str | None = None


class Staged(msgspec.Struct, frozen=True, tag="staged"):
    """`work/<sha256>/stage/` holds model.onnx, state.safetensors and report.json, synced."""

    task: str
    classes: int
    class_names: tuple[str, ...] | None
    method: str
    artifact: ArtifactEntry
    state_sha256: str
    scores: dict[str, float]
    seconds: dict[str, float]
    peak_rss_bytes: int
    warnings: tuple[str, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job ended with an error; `kind` says what is to be done about it."""

    # "input": quarantine; "hold": wait for a person's word; "environment": try again, no attempt lost; "setup": the
    # operator must act; "bug": attempt lost.
    kind: str
    error: dict[str, Any]


Answer = Hello | Progress | Staged | Failed
_job_decoder = msgspec.json.Decoder(Job)
_answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def encode_line(message: msgspec.Struct) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def decode_job(line: bytes) -> Job:
    return _job_decoder.decode(line)


def decode_answer(line: bytes) -> Answer:
    return _answer_decoder.decode(line)
