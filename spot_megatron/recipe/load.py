"""Reads recipes: strict YAML. A recipe may extend another and changes only what it names; --set changes one key.

An unknown key, a value of the wrong type or an impossible combination is a RecipeError that names the file and the key.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from spot_megatron.errors import RecipeError
from spot_megatron.files import did_you_mean
from spot_megatron.recipe.execution import Parallel
from spot_megatron.recipe.rules import check_combinations
from spot_megatron.recipe.schema import Recipe

RECIPE_FOLDER = Path(__file__).resolve().parents[2] / "recipes"  # the repository's; an installed package has none
VALUES = ("pairs",)  # mappings that are one value: another recipe's or --set's replaces them
LONGEST_NAME = 1000  # characters of a path in `extends`


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        name: a YAML file, or the name of one in recipes/.
        overrides: `key=value` with dotted keys; the value is read as YAML. Later ones win.

    Raises:
        RecipeError: naming the file and the key, with the remedy.
    """
    path = find_recipe(name)
    raw = _read_with_parents(path, ())
    for override in overrides:
        _apply_override(raw, override)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, path)) from None
    check_combinations(recipe, path)
    return recipe


def parallel_sizes(overrides: Sequence[str]) -> Parallel:
    """The parallel sizes set by `parallel.key=value` overrides; the others are 1.

    Raises:
        RecipeError: a key outside parallel, or an invalid value.
    """
    raw: dict[str, Any] = {}
    for override in overrides:
        if not override.startswith("parallel."):
            raise RecipeError(f"--set {override!r}: only keys of parallel are accepted here, such as parallel.tensor=2")
        _apply_override(raw, override)
    try:
        return Parallel.model_validate(raw.get("parallel", {}))
    except ValidationError as error:
        raise RecipeError(_explain(error, Path("--set"), "parallel.")) from None


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe, given as a path or as the name of one in the repository's recipes/.

    Raises:
        RecipeError: no such file and no such name; the message lists the known names.
    """
    for candidate in (Path(name), RECIPE_FOLDER / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))
    if not known:
        raise RecipeError(
            f"{str(name)!r} is not a file, and named recipes are part of the repository, not of the installed package: "
            "give the path of a YAML file, or run from a clone of the repository installed with pip install --editable"
        )
    hint = did_you_mean(str(name), known) or "."
    raise RecipeError(
        f"recipe {str(name)!r} was not found{hint} Known recipes: {', '.join(known)}. Or give the path of a YAML file"
    )


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in children:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(child.name for child in children)}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, a date such as 2026-13-01
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe must be a mapping of keys to values")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str) or not parent.isprintable() or len(parent) > LONGEST_NAME:
        raise RecipeError(f"{path}: extends must be the name of a recipe or the path of a YAML file")
    try:
        beside = path.parent / f"{parent}.yaml"
        base = beside if beside.is_file() else find_recipe(parent)
    except (RecipeError, OSError) as error:
        raise RecipeError(f"{path}: extends: {error}") from None
    return _merge(_read_with_parents(base, (*children, path.resolve())), raw)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a duplicate key is an error and 1e-6 is a number (YAML 1.1 reads it as a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} occurs twice in the mapping that starts at line {line}")
        return super().construct_mapping(node, deep)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> Any:
        text = self.construct_scalar(node)
        if node.style is None and "e" in text.lower():
            try:
                return float(text)
            except ValueError:
                pass
        return text


_StrictLoader.add_constructor("tag:yaml.org,2002:str", _StrictLoader.construct_yaml_str)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both_maps = isinstance(value, dict) and isinstance(merged.get(key), dict) and key not in VALUES
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r}: write key=value, as in --set optim.lr=1e-6")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML: {error}") from None
    *sections, leaf = key.split(".")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override!r}: {section} is a value, not a section")
    target.update(_merge(target, {leaf: value}))


def _explain(error: ValidationError, path: Path, prefix: str = "") -> str:
    lines = []
    for problem in error.errors():
        key = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {key!r}{did_you_mean(key, _known_keys(), cutoff=0.4)}")
        elif problem["type"] == "missing":
            lines.append(f"key {key!r} is missing")
        else:
            lines.append(f"{key}: {problem['msg']} (got {problem['input']!r})")
    return f"{path}: " + "; ".join(lines)


def _known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(prefix + (field.alias or name))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys
