"""Options as frozen dataclasses: read from TOML, checked, and turned back into plain values.

The schema is closed: unknown keys, wrong types and values out of range are `ConfigError`s that name the dotted key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from slipstream.errors import ConfigError, did_you_mean
from slipstream.registry import Registry

_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_T = TypeVar("_T")


def speed_only(default: Any) -> Any:
    """Give a field that changes how fast a stage works, never what it writes, so that it stays out of fingerprints."""
    return field(default=default, metadata={"execution": True})


def later(default: Any) -> Any:
    """Give a field that came after artifacts were first published: at its default it stays out of fingerprints.

    A default that is a mapping is made anew for each object.
    """
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata={"later": True})
    return field(default=default, metadata={"later": True})


def pick(cls: type[_T], source: object) -> _T:
    """Make a dataclass of another object's attributes of the same names."""
    return cls(**{spec.name: getattr(source, spec.name) for spec in dataclasses.fields(cls)})  # type: ignore[arg-type]


def require(holds: bool, key: str, expected: str, found: object) -> None:
    """Check the value of a key.

    Raises:
        ConfigError: It does not hold; names the key, what was expected and what was found.
    """
    if not holds:
        raise ConfigError(f"`{key}` must be {expected}, found {found!r}")


def parse_bytes(text: str | int) -> int:
    """Turn `4096`, `"64MiB"` or `"1.5GB"` into bytes.

    Raises:
        ValueError: Not a size, or negative.
    """
    if isinstance(text, bool):
        raise ValueError(f"expected a size such as 65536 or '64MiB', found {text!r}")
    if isinstance(text, int):
        size = text
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
        if match is None or match[2].upper() not in _SIZE_UNITS:
            raise ValueError(f"expected a size such as 65536 or '64MiB', found {text!r}")
        size = round(float(match[1]) * _SIZE_UNITS[match[2].upper()])
    if size < 0:
        raise ValueError(f"expected a size of at least 0 bytes, found {text!r}")
    return size


def parse_budget(text: str | int, *, total_bytes: int) -> int:
    """Turn a hot budget into bytes: a size, or `"1%"` of `total_bytes`.

    Raises:
        ValueError: Not a budget, or not above zero.
    """
    if isinstance(text, str) and text.strip().endswith("%"):
        try:
            percent = float(text.strip()[:-1])
        except ValueError:
            raise ValueError(f"expected a budget such as '64MiB' or '1%', found {text!r}") from None
        if not 0 < percent <= 100:
            raise ValueError(f"expected a share above 0% and up to 100%, found {text!r}")
        return int(total_bytes * percent / 100)
    size = parse_bytes(text)
    if size == 0:
        raise ValueError(f"expected a budget above 0 bytes, found {text!r}")
    return size


def check_size(key: str, value: str | int, *, least: int) -> None:
    """Check that the value of a key is a size of at least so many bytes.

    Raises:
        ConfigError: It is not.
    """
    try:
        size = parse_bytes(value)
    except ValueError as exc:
        raise ConfigError(f"`{key}`: {exc}") from exc
    require(size >= least, key, f"at least {least} bytes", value)


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a TOML file and apply `key=value` overrides.

    Args:
        path: TOML file.
        overrides: Dotted keys with TOML values; a value that is not TOML is taken as a string.

    Raises:
        ConfigError: The file cannot be read, or an override is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"expected a pipeline file at `{path}`: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"expected a TOML text file at `{path}`, found bytes that are not UTF-8") from exc
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"`{path}` is not valid TOML: {exc}") from exc
    for override in overrides:
        _apply_override(tree, override)
    return tree


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def build(cls: type[_T], tree: Mapping[str, Any], prefix: str = "") -> _T:
    """Turn a parsed TOML tree into a checked dataclass.

    Args:
        cls: The dataclass; the values of its fields check themselves when it is made.
        tree: Keys and values of a section.
        prefix: Dotted key of the section with a dot behind, for messages.

    Raises:
        ConfigError: A key, type or value is wrong.
    """
    hints = _hints(cls)  # type: ignore[arg-type]
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in specs:
            hint = did_you_mean(key, specs, prefix=prefix) or f"known keys: {', '.join(specs)}"
            raise ConfigError(f"unknown key `{prefix}{key}`", hint=hint)
    values = {}
    for name, spec in specs.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{prefix}{name}")
        elif required:
            raise ConfigError(f"missing key `{prefix}{name}`", hint="every pipeline file must set it")
    return cls(**values)


def to_dict(config: Any, *, execution: bool = True) -> dict[str, Any]:
    """Plain values of a dataclass of options, defaults filled in.

    Args:
        config: Any dataclass of options.
        execution: Keep the fields that do not change results, and the defaults of those that came later.
    """
    plain: dict[str, Any] = {}
    for spec in dataclasses.fields(config):
        default = spec.default if spec.default_factory is dataclasses.MISSING else spec.default_factory()
        is_later_default = spec.metadata.get("later") and getattr(config, spec.name) == default
        if not execution and (spec.metadata.get("execution") or is_later_default):
            continue
        plain[spec.name] = _plain(getattr(config, spec.name), execution=execution)
    return plain


def to_toml(key: str, value: Any) -> str:
    """Give a value as it would stand in a pipeline file.

    Args:
        key: Whose value it is.
        value: Text, a number, a truth value, or a list or mapping of such.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Real):
        return str(value)
    if isinstance(value, str | Path):
        return _quoted(str(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(str(name))} = {to_toml(key, of)}" for name, of in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_toml(key, each) for each in value) + "]"
    raise ConfigError(
        f"expected text, a number, a truth value, a list or a mapping for `{key}`, found {value!r}",
        hint="leave the key out to keep what the pipeline says",
    )


def _quoted(text: str) -> str:
    """Give a basic string of TOML: JSON's, but characters beyond ASCII as they are: pairs of surrogates are none."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"expected `--set key=value`, found `{override}`", hint="for example --set train.epochs=2")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"`{parent}` in `--set {override}` is a value, not a section")
    tree[last] = value


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{key}` must be a section, found {value!r}")
        return build(typing.cast(type, hint), value, f"{key}.")
    if origin is Literal:
        return _choose(args, value, key)
    if origin is Annotated:
        if dataclasses.is_dataclass(args[0]):
            return _build_chosen(args[0], args[1].find(), value, key)
        return _choose(args[1].find().names(), value, key)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(args[0], item, f"{key}[{index}]") for index, item in enumerate(items))
    if origin in (types.UnionType, typing.Union):
        present = [option for option in args if option is not types.NoneType]
        if len(present) == 1:
            return _convert(present[0], value, key)
        for option in present:
            if dataclasses.is_dataclass(option):
                if isinstance(value, Mapping):
                    return build(typing.cast(type, option), value, f"{key}.")
            elif _fits(option, value):
                return option(value)
        names = " or ".join(option.__name__ for option in present)
        raise ConfigError(f"`{key}` must be {names}, found {type(value).__name__}: {value!r}")
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"`{key}` must be a section, found {value!r}")
        return {name: _convert(args[1], item, f"{key}.{name}") for name, item in value.items()}
    if not _fits(hint, value):
        raise ConfigError(f"`{key}` must be {hint.__name__}, found {type(value).__name__}: {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"`{key}` must be a finite number, found {value}")
    return hint(value)


def _build_chosen(base: Any, registry: Registry[Any], value: Any, key: str) -> Any:
    """Give a section whose key `name` says which dataclass the others belong to."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{key}` must be a section, found {value!r}")
    defaults = {spec.name: spec.default for spec in dataclasses.fields(base)}
    name = _choose(registry.names(), value.get("name", defaults["name"]), f"{key}.name")
    keys_of = {other: [spec.name for spec in dataclasses.fields(registry.get(other))] for other in registry.names()}
    for unknown in [inner for inner in value if inner not in keys_of[name]]:
        if owners := [other for other, keys in keys_of.items() if unknown in keys]:
            raise ConfigError(
                f"`{key}.{unknown}` belongs to {', '.join(owners)}, found `{key}.name` = '{name}'",
                hint=f"leave it out; --set '{key}={{name=\"{name}\"}}' replaces the whole section",
            )
    # the name is given even where it is left out, so that what is stored says which dataclass it was
    return build(registry.get(name), {**value, "name": name}, f"{key}.")


def _choose(choices: Sequence[Any], value: Any, key: str) -> Any:
    if value not in choices or isinstance(value, bool):
        hint = did_you_mean(str(value), map(str, choices))
        raise ConfigError(f"`{key}` must be one of {', '.join(map(str, choices))}, found {value!r}", hint=hint)
    return value


def _fits(hint: type, value: Any) -> bool:
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _plain(value: Any, *, execution: bool) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value, execution=execution)
    if isinstance(value, Mapping):
        return {key: _plain(item, execution=execution) for key, item in sorted(value.items())}
    return [_plain(item, execution=execution) for item in value] if isinstance(value, tuple) else value
