"""Training from a recipe, a YAML file: `hf-ext train METHOD --config recipe.yaml`."""
