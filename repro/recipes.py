"""Shapes of lists."""

from dataclasses import replace

from repro.data import combine, real_lists
from repro.data import recipe as _old

RECIPES = ("graded", "binary")
__all__ = ["RECIPES", "combine", "real_lists", "recipe"]


def recipe(lists, name, seed):
    if name == "graded":
        return list(lists)
    return [replace(x, grades=[3, 0, 0]) for x in _old(lists, name, seed)]
