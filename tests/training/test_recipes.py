from pathlib import Path

import pytest

from echo_integrations.training.config import TrainingConfig

TRAINING = Path(__file__).parents[2] / "training"
RECIPES = sorted(TRAINING.glob("recipes/*.yaml"))


def test_there_are_recipes() -> None:
    assert {recipe.stem for recipe in RECIPES} >= {"echo-mini", "llama-3.1-8b", "qwen3-0.6b"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    config = TrainingConfig.from_yaml(recipe)
    assert recipe.stem.startswith(config.model.rsplit("/", 1)[-1].lower().removesuffix("-instruct"))


@pytest.mark.parametrize(("name", "rate"), [("qwen3-0.6b", 3e-4), ("llama-3.1-8b", 5e-4)])
def test_the_papers_recipes_are_the_papers(name: str, rate: float) -> None:
    config = TrainingConfig.from_yaml(TRAINING / "recipes" / f"{name}.yaml")
    assert (config.learning_rate, config.batch_size * config.max_steps) == (rate, 160_000)
    assert (config.thought_tokens, config.compression_tokens) == (10, 10)
    assert (config.warmup_steps, config.decay_steps, config.seed) == (100, 20_000, 42)
