"""What the verb `plan` writes: tables or one JSON object on stdout, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nano_pretrain.plan.calibration import calibrate
from nano_pretrain.plan.device import load_device
from nano_pretrain.plan.document import plan_document, search_document
from nano_pretrain.plan.room import without_room_on
from nano_pretrain.plan.search import search_stage
from nano_pretrain.plan.search_refusal import check_found
from nano_pretrain.plan.whole import Plan, make_plan
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.recipe.schema import Recipe


def answer_plan(recipe: Recipe, directory: Path) -> None:
    """Plan a checked recipe.

    Args:
        recipe: the recipe.
        directory: `plan.dir`, where plan.png goes; if that is null, the directory of the run, which is neither made nor
            written to: the picture goes beside it, as plan-NAME.png.

    Raises:
        UserError: as `make_plan`, or the picture cannot be written; when all is said, a stage that does not fit.
    """
    plan = make_plan(recipe)
    figure = directory / "plan.png" if recipe.plan.dir else directory.with_name(f"plan-{directory.name}.png")
    with _claimed(figure):
        _say(plan, figure)
        # Last: in a new environment matplotlib looks for fonts first, which takes seconds.
        from nano_pretrain.plan.figure import plan_figure

        plan_figure(plan.data).savefig(figure)
    for refusal in without_room_on(plan.device, recipe):
        raise refusal


def _say(plan: Plan, figure: Path) -> None:
    if plan.recipe.plan.format == "json":
        print(json.dumps(plan_document(plan, str(figure)), indent=1), flush=True)
        return
    from nano_pretrain.plan.tables import new_console, show_plan

    show_plan(new_console(), plan, str(figure))


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Make a file, to know that it can be made before anything is said; it goes again if nothing is written to it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UserError(f"plan.dir: cannot write {path} ({error.strerror}); write plan.dir=DIRECTORY") from error
    try:
        yield
    finally:
        if not path.stat().st_size:
            path.unlink()


def answer_search(recipe: Recipe) -> None:
    """Look for layouts of every stage of a recipe that is checked but for its own.

    Raises:
        UserError: hardware or metrics are not what they should be; when all is said, a stage for which nothing was
            found.
    """
    device = load_device(recipe)
    calibration = calibrate(recipe, device)
    factor = calibration.factor if calibration else 1.0
    searches = {name: search_stage(recipe, name, device, factor) for name in recipe.stages}
    if recipe.plan.format == "json":
        print(json.dumps(search_document(searches, device), indent=1), flush=True)
    else:
        from nano_pretrain.plan.notes import assumptions
        from nano_pretrain.plan.search_tables import show_search
        from nano_pretrain.plan.tables import new_console

        console = new_console()
        for name, search in searches.items():
            stage = recipe.stages[name]
            show_search(console, name, search, device, stage.global_batch_size * stage.sequence_length)
        for line in assumptions(device, recipe.plan, calibration):
            console.print(line)
    check_found(recipe, searches, device)
