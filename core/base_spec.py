"""What everybody must know of the base network, without torch: names, shapes, roles, digest."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from foldd.core.errors import BadSetup
from foldd.core.files import write_file
from foldd.core.roles import Role

TASK_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # fits a file name and an ONNX output name


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of the base. `tied_to` names the canonical entry where several names share one tensor."""

    shape: tuple[int, ...]
    role: Role
    tied_to: str | None = None


class BaseSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base network as `foldd init` found it; kept as `base/base.json` in the state directory."""

    digest: str  # of θ⁰, see core.digests.base_digest
    tensors: dict[str, TensorSpec]  # head excluded
    input_shape: tuple[int, ...]  # one sample, without the batch
    features: int  # width of the feature output
    head: str | None  # the base's own head layer, which a plain checkpoint names its head by
    ignored: tuple[str, ...] = ()  # tensors of the base that its features do not need; a checkpoint may hold them

    @property
    def canonical(self) -> dict[str, TensorSpec]:
        """The tensors without aliases of tied ones."""
        return {name: spec for name, spec in self.tensors.items() if spec.tied_to is None}

    @property
    def float_bytes(self) -> int:
        """Bytes of the model in float32: the unit in which memory is stated."""
        total = 0
        for spec in self.canonical.values():
            if spec.role is not Role.COUNTER:
                count = 1
                for n in spec.shape:
                    count *= n
                total += 4 * count
        return total

    def write(self, path: Path) -> None:
        write_file(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def read_base_spec(path: Path) -> BaseSpec:
    """Reads `base.json`.

    Raises:
        BadSetup: `not-initialised` where there is none, `broken-state` where it cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=BaseSpec)
    except FileNotFoundError as error:
        raise BadSetup(
            "not-initialised",
            f"There is no base network in {path.parent.parent}.",
            why="`foldd init` has not been run for this state directory.",
            remedy="Run `foldd init --config config.toml --base model.pt2` once.",
        ) from error
    except msgspec.MsgspecError as error:
        raise BadSetup(
            "broken-state",
            f"{path} cannot be read: {error}.",
            why="it was edited by hand, or written by another version of foldd.",
            remedy="Run `foldd init` into a fresh state directory.",
        ) from error
