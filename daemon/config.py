"""Reading `config.toml` into `Settings`; an error names the file, the line, the key and the nearest valid name."""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec

from foldd.core.errors import BadConfig, BadSetup
from foldd.core.wire import check_endpoint
from foldd.daemon.settings import Settings

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`(?: - at `\$(?P<path>.*)`)?")
_WRONG = re.compile(r"(?P<what>.*?) - at `\$(?P<path>.*)`", re.DOTALL)
_HEADER = re.compile(r"\s*\[\[?\s*(?P<name>[^\]]+?)\s*\]\]?")
_KEY = re.compile(r"\s*(?P<key>[A-Za-z0-9_.\"'-]+)\s*=")


@dataclass(frozen=True)
class Config:
    """A configuration with the place that it came from."""

    settings: Settings
    path: Path  # of the file; relative paths in it are relative to its folder

    @property
    def root(self) -> Path:
        """The state directory."""
        return self.resolve(self.settings.state.directory)

    def resolve(self, path: str) -> Path:
        return (self.path.parent / Path(path).expanduser()).resolve()

    @property
    def digest(self) -> str:
        """SHA-256 over the settings that decide what a fold computes and whether it is published."""
        settings = self.settings
        decisive = {
            "fold": settings.fold, "heads": settings.heads, "quantize": settings.quantize, "gate": settings.gate,
        }  # fmt: skip
        return hashlib.sha256(msgspec.json.encode(decisive, order="sorted")).hexdigest()


def load_config(path: Path) -> Config:
    """Reads and checks a configuration file.

    Raises:
        BadConfig: with file, line and key in `what`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except OSError as error:
        why, remedy = "", "Name another file with --config FILE."
        if isinstance(error, FileNotFoundError):
            why = "none was made yet, or it is elsewhere."
            remedy = (
                f"Make one with `touch {path}`: every key has a default, and the commented config.toml that comes with "
                "foldd shows them. Or name another file with --config FILE."
            )
        raise BadConfig("no-config", f"{path} cannot be read: {error.strerror}.", why=why, remedy=remedy) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig("bad-toml", f"{path} is not valid TOML: {error}.") from error
    try:
        settings = msgspec.convert(values, Settings, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error), path, text) from error
    config = Config(settings, path.resolve())
    _check_paths(config, text)
    _check_weighting(config, text)
    _check_endpoints(config, text)
    return config


def _explain(message: str, path: Path, text: str) -> BadConfig:
    if match := _UNKNOWN.fullmatch(message):
        table = _keys(match["path"])
        key = [*table, match["key"]]
        valid = _fields(table)
        near = difflib.get_close_matches(match["key"], valid, n=1, cutoff=0.5)
        elsewhere = [".".join(place) for place in _all_keys() if place[-1] == match["key"]]
        if near:
            remedy = f"Did you mean {near[0]!r}?"
        elif elsewhere:
            remedy = f"There is a key {elsewhere[0]!r}: it stands in another table."
        else:
            remedy = f"Valid here: {', '.join(valid)}."
        return BadConfig(
            "unknown-key", f"{path}, line {_line(text, key)}: there is no key {'.'.join(key)!r}.", remedy=remedy
        )
    match = _WRONG.fullmatch(message)
    key = _keys(match["path"]) if match else []
    what = (match["what"] if match else message).replace("`", "")
    choices = _choices(key)
    if given := re.fullmatch(r"Invalid enum value '(.*)'", what):
        near = difflib.get_close_matches(given[1], choices, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        what = f"{given[1]!r} is none of its values"
        remedy = f"{hint}Valid: {', '.join(choices)}."
        if key == ["fold", "data_free_method"] and given[1] in _choices(["fold", "method"]):
            what = f"{given[1]!r} needs calibration inputs, and this method is for checkpoints that bring none"
            remedy = f"Choose one of {', '.join(choices)}."
    else:
        remedy = "The commented config.toml that comes with foldd shows every key with its default."
    return BadConfig("wrong-value", f"{path}, line {_line(text, key)}: {'.'.join(key)}: {what}.", remedy=remedy)


def _choices(key: list[str]) -> list[str]:
    """The values of a key that takes one of a few words, or a number too; empty for all others."""
    if not key or key[-1] not in _fields(key[:-1]):
        return []
    return list(_words(_type_of(key)))


def _words(kind: Any) -> Iterable[str]:
    if get_origin(kind) is Annotated:
        yield "a number"
    for value in get_args(kind) if get_origin(kind) is not Annotated else ():
        if isinstance(value, str):
            yield value
        else:
            yield from _words(value)


def _keys(path: str | None) -> list[str]:
    """`.intake.settle_seconds[0]` → ["intake", "settle_seconds"]"""
    return [re.sub(r"\[.*?\]", "", part) for part in (path or "").split(".") if part]


def _line(text: str, key: list[str]) -> int:
    """The line of a key, or of the closest table around it; tomllib does not tell."""
    best, section = 1, []
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = [part.strip("\"' ") for part in header["name"].split(".")]
            if section == key[: len(section)]:
                best = number
        elif match := _KEY.match(line):
            place = [*section, *(part.strip("\"'") for part in match["key"].split("."))]
            if place == key:
                return number
            if place == key[: len(place)]:  # a key inside an inline table
                best = number
    return best


def _fields(table: list[str]) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(_struct_in(_type_of(table)))]


def _type_of(key: list[str]) -> Any:
    kind: Any = Settings
    for name in key:
        kind = next(f.type for f in msgspec.structs.fields(_struct_in(kind)) if f.encode_name == name)
    return kind


def _struct_in(kind: Any) -> Any:
    """The table type inside `tuple[Table, ...]`, or the type itself."""
    arguments = [a for a in getattr(kind, "__args__", ()) if isinstance(a, type) and issubclass(a, msgspec.Struct)]
    return arguments[0] if arguments else kind


def _all_keys(kind: Any = Settings, place: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    for field in msgspec.structs.fields(kind):
        here = (*place, field.encode_name)
        yield here
        inner = _struct_in(field.type)
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            yield from _all_keys(inner, here)


def _check_paths(config: Config, text: str) -> None:
    """Files and folders that the daemon needs must be there before it starts, not when they are first used."""
    bus = config.settings.bus
    needed = [(["bus", name], getattr(bus, name)) for name in ("identity", "submitters", "devices")]
    for key, value in needed:
        if value and not config.resolve(value).exists():
            raise BadConfig(
                "missing-path",
                f"{config.path}, line {_line(text, key)}: {'.'.join(key)}: there is no {config.resolve(value)}.",
                remedy="Make keys with `foldd keygen`, and folders with mkdir; paths are relative to the file.",
            )


def _check_weighting(config: Config, text: str) -> None:
    """A weight for samples that are never looked at would be a setting that silently does nothing."""
    heads = config.settings.heads
    if heads.weighting != "none" and heads.mode != "tuned":
        key = ["heads", "weighting"]
        raise BadConfig(
            "unsupported-combination",
            f'{config.path}, line {_line(text, key)}: {".".join(key)} = "{heads.weighting}" weighs labelled samples, '
            f'and heads.mode = "{heads.mode}" looks at no labels.',
            remedy='Set heads.mode = "tuned", the nearest mode that does, or leave heads.weighting out.',
        )


def _check_endpoints(config: Config, text: str) -> None:
    bus = config.settings.bus
    given = [("bind", bus.bind, True), ("announce", bus.announce, True)]
    given += [("subscribe", publisher.endpoint, False) for publisher in bus.subscribe]
    for name, endpoint, bind in given:
        if not endpoint and name != "subscribe":
            continue
        try:
            check_endpoint(endpoint, bind=bind)
        except BadSetup as error:
            where = f"{config.path}, line {_line(text, ['bus', name])}: bus.{name}"
            raise BadConfig(error.code, f"{where}: {error.what}", remedy=error.remedy) from error
