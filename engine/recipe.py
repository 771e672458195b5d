"""Recipes: one TOML file per run worth repeating.

A recipe is resolved once (file, then `--set section.field=value`), checked, and saved with the run.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from hotloop.engine.config import Recipe
from hotloop.engine.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


class RecipeError(UserError):
    """A recipe that cannot be run: names the field, what was given and what is allowed."""


def load_recipe(path: Path | str, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.field=value` overrides (values as in TOML; bare words are strings).

    Raises RecipeError with the field, what was given and what is allowed.
    """
    recipe = from_dict(Recipe, load_toml(path, overrides), where=f"recipe {path}")
    check(recipe)
    return recipe


def load_toml(path: Path | str, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """Raises RecipeError for a file that cannot be read or is not TOML, and for an override that is none."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RecipeError(f"recipe {path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    return values


def check(recipe: Recipe) -> None:
    """Constraints that one field alone does not show. Raises RecipeError."""
    m, t, g, masking = recipe.model, recipe.train, recipe.guards, recipe.masking

    positive = {
        "model.context": m.context, "model.n_layers": m.n_layers, "model.d_model": m.d_model,
        "model.n_heads": m.n_heads, "model.n_kv_heads": m.n_kv_heads, "model.d_ff": m.d_ff,
        "model.vocab_size": m.vocab_size, "data.context": recipe.data.context, "train.steps": t.steps,
        "train.global_batch": t.global_batch, "train.micro_batch": t.micro_batch, "train.threads": t.threads,
        "optimizer.max_grad_norm": recipe.optimizer.max_grad_norm, "evaluation.patience": recipe.evaluation.patience,
        "evaluation.max_bytes": recipe.evaluation.max_bytes, "checkpoint.every": recipe.checkpoint.every,
        "checkpoint.keep_last": recipe.checkpoint.keep_last, "log.every": recipe.log.every, "guards.window": g.window,
        "guards.budget_window": g.budget_window, "guards.outlier_z": g.outlier_z, "model.rope_theta": m.rope_theta,
        "model.norm_eps": m.norm_eps, "model.head_dim": m.head_dim, "model.local_window": m.local_window,
        "model.global_every": m.global_every, "model.local_rope_theta": m.local_rope_theta,
        "initial.context": recipe.initial.context,
    }  # fmt: skip
    for name, value in positive.items():
        require(value is None or value > 0, f"{name} = {value}: must be greater than 0")
    not_negative = {
        "data.workers": recipe.data.workers, "optimizer.lr": recipe.optimizer.lr, "optimizer.eps": recipe.optimizer.eps,
        "optimizer.weight_decay": recipe.optimizer.weight_decay, "schedule.warmup_steps": recipe.schedule.warmup_steps,
        "evaluation.every": recipe.evaluation.every, "checkpoint.keep_best": recipe.checkpoint.keep_best,
        "guards.skip_budget": g.skip_budget, "guards.max_rewinds": g.max_rewinds, "model.init_std": m.init_std,
        "model.token_types": m.token_types, "model.n_labels": m.n_labels,
    }  # fmt: skip
    for name, value in not_negative.items():
        require(value >= 0, f"{name} = {value}: must not be negative")
    for name, value in {"optimizer.beta1": recipe.optimizer.beta1, "optimizer.beta2": recipe.optimizer.beta2,
                        "model.dropout": m.dropout,
                        "initial.dropout": recipe.initial.dropout or 0.0}.items():  # fmt: skip
        require(0 <= value < 1, f"{name} = {value}: must be at least 0 and below 1")
    for name, value in {"schedule.decay_fraction": recipe.schedule.decay_fraction,
                        "schedule.final_lr_ratio": recipe.schedule.final_lr_ratio,
                        "masking.mask_share": masking.mask_share,
                        "masking.random_share": masking.random_share}.items():  # fmt: skip
        require(0 <= value <= 1, f"{name} = {value}: must be between 0 and 1")
    require(0 < masking.rate < 1, f"masking.rate = {masking.rate}: must be above 0 and below 1")
    require(
        masking.mask_share + masking.random_share <= 1,
        f"masking.mask_share + masking.random_share = {masking.mask_share + masking.random_share:g}: at most 1",
    )
    require(
        recipe.evaluation.patience is None or recipe.evaluation.every > 0,
        f"evaluation.patience = {recipe.evaluation.patience}: needs evaluation.every > 0, it is 0 (never)",
    )
    require(0 <= t.seed < 1 << 63, f"train.seed = {t.seed}: must be at least 0 and below 2^63")
    require(
        m.head_dim is not None or m.d_model % m.n_heads == 0,
        f"model.d_model = {m.d_model}: must be a multiple of model.n_heads = {m.n_heads}",
    )
    name, head_dim = (
        ("model.d_model / model.n_heads", m.d_model // m.n_heads)
        if m.head_dim is None
        else ("model.head_dim", m.head_dim)
    )
    require(head_dim % 8 == 0, f"{name} = {head_dim}: the head dimension must be a multiple of 8")
    require(
        m.local_rope_theta is None or m.positions == "rotary",
        f"model.local_rope_theta = {m.local_rope_theta}: model.positions is {m.positions!r}, not 'rotary'",
    )
    require(
        m.n_heads % (m.n_kv_heads or m.n_heads) == 0,
        f"model.n_kv_heads = {m.n_kv_heads}: must divide model.n_heads = {m.n_heads}",
    )
    for i, source in enumerate(recipe.data.sources):
        require(bool(source.path), f"data.sources[{i}].path is not set; give the folder that `hotloop prepare` wrote")
        require(source.weight > 0, f"data.sources[{i}].weight = {source.weight}: must be greater than 0")
    require(
        # A checkpoint to begin with has a context of its own.
        bool(recipe.initial.path) or recipe.data.context is None or recipe.data.context <= m.context,
        f"data.context = {recipe.data.context}: longer than the model's (model.context = {m.context})",
    )
    require(
        t.global_batch % t.micro_batch == 0,
        f"train.global_batch = {t.global_batch}: must be a multiple of train.micro_batch = {t.micro_batch}",
    )
    _check_classification(recipe)


def require(ok: bool, message: str) -> None:
    if not ok:
        raise RecipeError(message)


def _check_classification(recipe: Recipe) -> None:
    labels, f = recipe.labels, recipe.finetune
    require(labels.budget is None or labels.budget > 1, f"labels.budget = {labels.budget}: must be at least 2")
    require(labels.split_seed >= 0, f"labels.split_seed = {labels.split_seed}: must not be negative")
    for name, share in {
        "validation_fraction": labels.validation_fraction,
        "test_fraction": labels.test_fraction,
    }.items():
        require(share is None or 0 < share < 1, f"labels.{name} = {share}: must be greater than 0 and below 1")
    require(
        labels.split_field is None or not (labels.validation or labels.test or labels.budget),
        "labels.split_field: with it labels.validation, labels.test and labels.budget must be left out",
    )
    twice = sorted({name for name in labels.classes if labels.classes.count(name) > 1})
    require(not twice, f"labels.classes: {', '.join(map(repr, twice))} is there twice")
    require(
        not labels.weights or bool(labels.classes),
        "labels.weights: needs labels.classes, in whose order the weights are",
    )
    require(
        not labels.weights or labels.class_weights == "none",
        f"labels.weights: leave out labels.class_weights = {labels.class_weights!r}",
    )
    require(
        all(weight >= 0 for weight in labels.weights) and (not labels.weights or max(labels.weights) > 0),
        f"labels.weights = {list(labels.weights)}: must not be negative, nor all 0",
    )
    require(0 < f.layer_decay <= 1, f"finetune.layer_decay = {f.layer_decay}: must be greater than 0 and at most 1")
    require(f.frozen_layers >= 0, f"finetune.frozen_layers = {f.frozen_layers}: must not be negative")
    require(f.epochs is None or f.epochs > 0, f"finetune.epochs = {f.epochs}: must be greater than 0")


def from_dict(cls: type[T], values: dict[str, Any], where: str = "", *, inside: bool = False) -> T:
    """Build a (nested) dataclass from a dictionary, checking names and types. Raises RecipeError.

    where: begins the message; inside: it already names a section.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1) or _sections_with(name, hints)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RecipeError(f"{where}: unknown field {name!r}{hint} (allowed: {', '.join(known)})")
        arguments[name] = _convert(hints[name], value, f"{where}.{name}" if inside else f"{where}: {name}")
    return cls(**arguments)


def to_dict(config: Any) -> dict[str, Any]:
    """The nested dictionary that `from_dict` reads. TOML has no null: a field that is None is left out where that is
    its default, and "none" elsewhere."""
    return {
        f.name: "none" if value is None else _plain(value, to_dict)
        for f in fields(config)
        if (value := getattr(config, f.name)) is not None or f.default is not None
    }


def to_toml(config: Any) -> str:
    return tomli_w.dumps(to_dict(config))


def identity(config: Any) -> dict[str, Any]:
    """Like `to_dict`, without the fields that say only how the run is carried out."""
    return {
        f.name: _plain(value, identity)
        for f in fields(config)
        if not f.metadata.get("execution") and (value := getattr(config, f.name)) is not None
    }


def _plain(value: Any, inside: typing.Callable[[Any], dict[str, Any]]) -> Any:
    """Lists for tuples, and what `inside` makes of a section."""
    if isinstance(value, tuple):
        return [_plain(one, inside) for one in value]
    return inside(value) if dataclasses.is_dataclass(value) else value


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """`section.field: a -> b` for every field in which two dictionaries of `to_dict` or `identity` differ."""
    lines = []
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) or isinstance(right, dict):
            lines += differences(left or {}, right or {}, f"{prefix}{name}.")
        elif left != right:
            lines.append(f"{prefix}{name}: {left!r} -> {right!r}")
    return lines


def _sections_with(name: str, hints: dict[str, Any]) -> list[str]:
    """`section.name` of the sections that have such a field."""
    return [f"{s}.{name}" for s, hint in hints.items() if name in getattr(hint, "__dataclass_fields__", ())]


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecipeError(f"{where} = {value!r}: expected a section")
        return from_dict(hint, value, where, inside=True)  # type: ignore[arg-type]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value == "none":
            return None
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return _convert(options[0], value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{where} = {value!r}: expected a list")
        member, _ = typing.get_args(hint)
        return tuple(_convert(member, one, f"{where}[{i}]") for i, one in enumerate(value))
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise RecipeError(f"{where} = {value!r}: expected one of {', '.join(map(repr, allowed))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise RecipeError(f"{where} = {value!r}: expected a finite number")
    if type(value) is not hint:
        expected = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]
        raise RecipeError(f"{where} = {value!r}: expected {expected}")
    return value


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: expected section.field=value, e.g. --set train.steps=100")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, name = path.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override}: {section!r} is not a section")
    values[name] = value
