"""Recipes: what the user wrote. `schema` says what a recipe holds, `reader` reads one."""
