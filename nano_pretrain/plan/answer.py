"""What the verb `plan` writes: tables or one JSON object on stdout, and a picture."""

from __future__ import annotations

import json
from pathlib import Path

from nano_pretrain.plan.calibration import calibrate
from nano_pretrain.plan.device import load_device
from nano_pretrain.plan.document import plan_document, search_document
from nano_pretrain.plan.search import search_stage
from nano_pretrain.plan.whole import make_plan
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import Recipe

FIGURE = "plan.png"


def answer_plan(recipe: Recipe, directory: Path) -> None:
    """Plan a checked recipe; the picture goes to `directory`.

    Raises:
        UserError: as `make_plan`, or the picture cannot be written.
    """
    plan = make_plan(recipe)
    figure = directory / FIGURE
    _claim(figure)
    if recipe.plan.format == "json":
        print(json.dumps(plan_document(plan, str(figure)), indent=1), flush=True)
    else:
        from nano_pretrain.plan.tables import new_console, show_plan

        show_plan(new_console(), plan, str(figure))
    # Last: in a new environment matplotlib looks for fonts first, which takes seconds.
    from nano_pretrain.plan.figure import plan_figure

    plan_figure(plan.data).savefig(figure)


def _claim(path: Path) -> None:
    """Make a file, to know that it can be made before anything is said."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"plan.dir: cannot write {path} ({error.strerror}); write plan.dir=DIRECTORY") from error


def answer_search(recipe: Recipe) -> None:
    """Look for layouts of every stage of a recipe that is checked but for its own.

    Raises:
        UserError: hardware or metrics are not what they should be.
    """
    device = load_device(recipe)
    calibration = calibrate(recipe, device)
    factor = calibration.factor if calibration else 1.0
    searches = {name: search_stage(recipe, name, device, factor) for name in recipe.stages}
    if recipe.plan.format == "json":
        print(json.dumps(search_document(searches, device), indent=1))
        return
    from nano_pretrain.plan.notes import assumptions
    from nano_pretrain.plan.search_tables import show_search
    from nano_pretrain.plan.tables import new_console

    console = new_console()
    for name, search in searches.items():
        stage = recipe.stages[name]
        show_search(console, name, search, device, stage.global_batch_size * stage.sequence_length)
    for line in assumptions(device, recipe.plan, calibration):
        console.print(line)
