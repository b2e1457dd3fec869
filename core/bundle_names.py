"""Checkpoints whose tensors are not the base's: what is likely the cause, told from the names alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from foldd.core.bundle_fields import some
from foldd.core.errors import BadCheckpoint

_ADAPTER = re.compile(r"(^|[._])lora_")
_SHARD = re.compile(r"(?P<model>.+)-\d{5}-of-\d{5}\.safetensors")


def sharded_model(name: str) -> str | None:
    """The model that a file is one shard of, by the names that transformers gives; None for any other file."""
    shard = _SHARD.fullmatch(name)
    return shard["model"] if shard else None


def unknown_tensors(name: str, unknown: Sequence[str]) -> BadCheckpoint:
    """`unknown-tensors`, of a file called `name`."""
    if any(_ADAPTER.search(tensor) for tensor in unknown):
        why = "an adapter (LoRA) was saved instead of the model that it changes."
        remedy = "Merge the adapter into the model (peft: `merge_and_unload()`), and save every weight of that."
    else:
        why = "another architecture, or names with a prefix such as `module.`."
        remedy = "Save the state dict under the base's own names."
    return BadCheckpoint(
        "unknown-tensors", f"{name}: the base has no tensor {some(list(unknown))}.", why=why, remedy=remedy
    )


def missing_tensors(name: str, missing: Sequence[str]) -> BadCheckpoint:
    """`missing-tensors`, of a file called `name`."""
    if model := sharded_model(name):
        why = "it is one shard of a model that was saved in several files."
        remedy = (
            f"Make one file of them first: foldd merge {model}.safetensors.index.json --method average "
            f"--shard-bytes 0 -o {model}.safetensors"
        )
    else:
        why = "an adapter or a part of the model was saved instead of the whole."
        remedy = "Save every weight and buffer of the model (integer counters may be left out)."
    return BadCheckpoint("missing-tensors", f"{name} lacks {some(list(missing))}.", why=why, remedy=remedy)
