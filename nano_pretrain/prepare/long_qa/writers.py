"""Which writer a recipe asks for."""

from __future__ import annotations

from pathlib import Path

from nano_pretrain.prepare.long_qa.extractive import extractive
from nano_pretrain.prepare.long_qa.openai import OpenAIWriter
from nano_pretrain.prepare.long_qa.passages import Writer
from nano_pretrain.recipe.errors import RecipeError
from nano_pretrain.recipe.schema import DataConfig


def make_writer(data: DataConfig) -> Writer:
    """The writer of `data.long_qa`; nothing is asked yet.

    Raises:
        UserError: a setting of it, or the key in the environment, is wrong.
    """
    settings = data.long_qa
    if settings.writer == "extractive":
        return extractive
    for field, value in (("url", settings.url), ("model", settings.model)):
        if not value:
            raise RecipeError(f"data.long_qa.{field}", "is missing", f"the writer openai needs it: write its {field}")
    assert settings.url
    assert settings.model
    cache = Path(data.cache_dir) / "long_qa"
    return OpenAIWriter(settings.url, settings.model, settings.concurrency, settings.timeout_seconds, cache)
