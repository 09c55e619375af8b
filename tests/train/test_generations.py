"""A run to whose corpus shards are added: trained for real, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nano_pretrain.checkpoint.manifest import read_manifest
from nano_pretrain.compose import compose
from nano_pretrain.recipe.errors import UserError
from nano_pretrain.train.before import check_before
from nano_pretrain.train.run import train
from nano_pretrain.train.signals import StopRequest
from tests.corpora import add_generation, write_corpus
from tests.train.small_run import QUICK, SMALL, TOKENS_PER_STEP, learned

STEPS, BEGUN = 8, 4
SHORT = [
    "~stages.pretrain.phases.p2", "~stages.pretrain.phases.p3", "stages.pretrain.phases.p1.share=1",
    f"stages.pretrain.tokens={STEPS * TOKENS_PER_STEP}", "stages.pretrain.schedule.warmup_tokens=0",
    "stages.pretrain.schedule.decay_tokens=0", "model.pattern=M-", "validation.every=0", "log.every=0",
    f"checkpoint.every={BEGUN}", "checkpoint.keep=9",
]  # fmt: skip


def trained(root: Path, name: str, corpus: Path) -> Path:
    """A run to its end, or the rest of it."""
    place = [f"data.path={corpus}", f"run.dir={root}", f"run.name={name}"]
    overrides = [*SMALL, *QUICK, *SHORT, *place]
    curriculum = check_before(compose(overrides).recipe, overrides, root / name, first_rank=True)
    assert train(curriculum.recipe, curriculum.acts, root / name, StopRequest()) == 0
    return root / name


def rewind(run: Path) -> Path:
    """As if it had been killed after its first checkpoint."""
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name) > BEGUN * TOKENS_PER_STEP:
            shutil.rmtree(checkpoint)
    (run / "exit.json").unlink()
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus so small that its first source is read again after half of the run, and a run on it."""
    root = tmp_path_factory.mktemp("generations")
    trained(root, "old", write_corpus(root / "corpus", documents=20))
    return root


@pytest.fixture(scope="module")
def grown(root: Path) -> Path:
    """That corpus with shards added to two of its sources."""
    corpus = Path(shutil.copytree(root / "corpus", root / "grown"))
    add_generation(corpus, "alpha", documents=8)
    add_generation(corpus, "gamma", documents=8)
    return corpus


def test_a_run_goes_on_as_if_the_shards_had_been_there(
    root: Path, grown: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(root / "old", root / "resumed")
    resumed = trained(root, rewind(root / "resumed").name, grown)
    assert f"more training tokens than at {BEGUN * TOKENS_PER_STEP:,}: alpha " in capfd.readouterr().out
    # The same layout and hardware: bit for bit.
    assert learned(resumed) == learned(trained(root, "new", grown))
    old = learned(root / "old")
    assert learned(resumed)[: BEGUN + 1] == old[: BEGUN + 1]
    assert learned(resumed)[-1] != old[-1], "the added shards were never read"
    manifests = [read_manifest(resumed / "checkpoints" / str(n * TOKENS_PER_STEP)) for n in (BEGUN, STEPS)]
    generations = [len(m.shards["sources"]["alpha"]["generations"]) for m in manifests if m and m.shards]
    assert generations == [1, 2]


def test_shards_that_would_reorder_and_shards_that_changed_are_refused(root: Path, grown: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.path: source alpha has shards that were added after the run in "):
        trained(root, "old", grown)
    manifest = json.loads((root / "corpus/manifest.json").read_text())
    manifest["sources"]["beta"]["train"]["shards"][0]["bin_sha256"] = "other"
    other = Path(shutil.copytree(root / "corpus", root / "other"))
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"^data\.path: the shards in [^\n]+: generation 0 of source beta has changed; "
    ):
        trained(root, "old", other)
