"""Recipes: what is read, what is refused and with which words."""

from __future__ import annotations

import pytest

from hotloop.engine.config import Recipe
from hotloop.engine.recipe import (  # fmt: skip
    RecipeError,
    check,
    differences,
    from_dict,
    identity,
    load_recipe,
    to_dict,
    to_toml,
)


def write(tmp_path, text: str):
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_round_trip(tmp_path):
    recipe = load_recipe(write(tmp_path, "[train]\nsteps = 7\n[optimizer]\nlr = 1\n"))
    assert recipe.train.steps == 7
    assert recipe.optimizer.lr == 1.0
    assert isinstance(recipe.optimizer.lr, float)
    again = load_recipe(write(tmp_path, to_toml(recipe)))
    assert again == recipe
    assert from_dict(Recipe, to_dict(recipe)) == recipe


def test_overrides(tmp_path):
    path = write(tmp_path, "[train]\nsteps = 7\n")
    recipe = load_recipe(
        path, ["train.steps=9", "schedule.kind=trapezoid", "optimizer.max_grad_norm=none", "data.path=a b"]
    )
    assert (recipe.train.steps, recipe.schedule.kind, recipe.optimizer.max_grad_norm) == (9, "trapezoid", None)
    assert recipe.data.path == "a b"


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("[train]\nstep = 7\n", (), ["train", "'step'", "did you mean 'steps'", "micro_batch"]),
        ("[trian]\n", (), ["'trian'", "did you mean 'train'"]),
        ("[train]\nsteps = 'many'\n", (), ["train", "steps", "'many'", "an integer"]),
        ("[train]\nsteps = true\n", (), ["steps", "True", "an integer"]),
        ("[schedule]\nkind = 'cosin'\n", (), ["kind", "'cosin'", "'cosine'", "'trapezoid'"]),
        ("train = 3\n", (), ["train", "3", "a section"]),
        ("[train\n", (), ["not valid TOML"]),
        ("", ("train.steps",), ["--set train.steps", "section.field=value"]),
        ("", ("train.steps=0",), ["train.steps = 0", "greater than 0"]),
        ("", ("optimizer.beta1=1.0",), ["optimizer.beta1 = 1.0", "below 1"]),
        ("", ("schedule.decay_fraction=2",), ["schedule.decay_fraction = 2", "between 0 and 1"]),
        ("", ("model.n_heads=5",), ["model.d_model = 384", "multiple of model.n_heads = 5"]),
        ("", ("model.d_model=36", "model.n_heads=6"), ["head dimension", "6", "multiple of 8"]),
        ("", ("model.n_kv_heads=4",), ["model.n_kv_heads = 4", "divide"]),
        ("", ("data.context=4096",), ["data.context = 4096", "model.context = 1024"]),
        ("", ("train.global_batch=12",), ["train.global_batch = 12", "multiple of train.micro_batch = 8"]),
        ("", ("train.steps.x=1",), ["'steps'", "not a section"]),
    ],
)
def test_a_wrong_recipe_is_refused_in_words(tmp_path, text, overrides, words):
    if overrides == ("train.steps.x=1",):
        text = "[train]\nsteps = 3\n"
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, text), overrides)
    message = str(error.value)
    assert "\n" not in message or "TOML" in message
    for word in words:
        assert word in message


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read"):
        load_recipe(tmp_path / "none.toml")


def test_identity_leaves_out_how_the_run_is_carried_out():
    a = Recipe()
    b = from_dict(Recipe, {"train": {"micro_batch": 4, "threads": 1}, "log": {"every": 3}, "checkpoint": {"every": 1}})
    c = from_dict(Recipe, {"train": {"seed": 1}})
    assert identity(a) == identity(b)
    assert differences(identity(a), identity(c)) == ["train.seed: 0 -> 1"]
    assert differences(to_dict(a), to_dict(b))


def test_the_defaults_pass():
    check(Recipe())
