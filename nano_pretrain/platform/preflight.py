"""Dependencies that fail late or silently when they are absent, checked before anything starts; imports no torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from urllib.parse import urlsplit

from nano_pretrain.platform.versions import EVERYWHERE, check_versions
from nano_pretrain.recipe.errors import RecipeError, UserError
from nano_pretrain.recipe.schema import Recipe

UNDECLARED = {
    "psutil": "megatron-core's checkpoint writer waits for ever without it",
    "triton": "megatron-core's Mamba mixer imports it",
    "einops": "megatron-core's Mamba mixer imports it",
}
"""Packages that megatron-core needs and does not declare."""


def check_dependencies(recipe: Recipe) -> None:
    """Refuse what cannot run here.

    Raises:
        UserError: a package is missing or of another version than this package declares.
        RecipeError: the recipe asks for wandb without a key.
    """
    for package, reason in UNDECLARED.items():
        if find_spec(package) is None:
            raise UserError(f"{package}: not installed, and {reason}; pip install {package}")
    check_versions(EVERYWHERE)
    if recipe.log.wandb == "online" and not _has_wandb_key():
        raise RecipeError("log.wandb", "online needs an API key", "set WANDB_API_KEY or write log.wandb=offline")


def _has_wandb_key() -> bool:
    """Whether wandb will find a key: in the environment, or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False
