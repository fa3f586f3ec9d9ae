"""The learning signals: a folder per family, a file per method, found by looking."""

import inspect
import pkgutil
from functools import cache
from importlib import import_module
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from unlabeled.errors import InputError
from unlabeled.parameters import Encoder, Training, nearest, validated
from unlabeled.signals.signal import Signal


def all_signals() -> dict[str, type[Signal]]:
    """Return every learning signal by its method's name, the name of its file, sorted."""
    return {name: find_signal(name) for name in sorted(_modules())}


def find_signal(name: str) -> type[Signal]:
    """Return a method's class.

    Raises:
        InputError: there is no such method; the nearest name is given.
    """
    modules = _modules()
    if name not in modules:
        raise InputError(f"unknown method '{name}'{nearest(name, list(modules))}")
    module = import_module(modules[name])
    (kind,) = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Signal) and value.__module__ == module.__name__
    ]
    return kind


def settings_model(name: str) -> type[BaseModel]:
    """Return a method's settings with their defaults and meanings, as a model.

    The keyword arguments of the method's constructor are its settings: their annotations (with pydantic's
    `Field` for ranges) and defaults are what is checked against.

    Raises:
        InputError: there is no such method.
    """
    keywords = list(inspect.signature(find_signal(name).__init__).parameters.values())[2:]
    types = get_type_hints(find_signal(name).__init__, include_extras=True)
    fields: dict[str, Any] = {keyword.name: (types[keyword.name], keyword.default) for keyword in keywords}
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def method_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a method's settings, checked and complete; `training` and `encoder` hold what it overrides.

    Raises:
        InputError: an unknown method or key (the nearest is given), or a wrong value, by its dotted path.
    """
    sections: dict[str, type[BaseModel]] = {"training": Training, "encoder": Encoder}
    fields: dict[str, Any] = {section: (dict[str, Any], {}) for section in sections}
    model = create_model(name, __base__=settings_model(name), **fields)
    checked = validated(model, settings, f"pretrain.{name}").model_dump()
    for section, kind in sections.items():
        values = validated(kind, checked[section], f"pretrain.{name}.{section}")
        checked[section] = values.model_dump(exclude_unset=True)
    return checked


def encoder_section(method: dict[str, Any], encoder: Encoder) -> Encoder:
    """Return the encoder section as a method trains it: its own override before its default before the run's.

    Args:
        method: {"name": "simclr", **settings}.
    """
    settings = {key: value for key, value in method.items() if key != "name"}
    own = find_signal(method["name"]).encoder_defaults | method_settings(method["name"], settings)["encoder"]
    return encoder.model_copy(update=own)


@cache
def _modules() -> dict[str, str]:
    found = pkgutil.walk_packages(__path__, __name__ + ".")
    return {module.name.rpartition(".")[2]: module.name for module in found if module.name.count(".") == 3}
