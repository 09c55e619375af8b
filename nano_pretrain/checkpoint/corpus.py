"""Whether a corpus is the one that a checkpoint was trained on, or that one with more shards; imports no torch."""

from __future__ import annotations

from pathlib import Path

from nano_pretrain.checkpoint.manifest import Manifest, read_manifest, whole_checkpoints
from nano_pretrain.data.curriculum import Curriculum
from nano_pretrain.data.record import added_tokens, first_change, generation_tokens, in_words
from nano_pretrain.data.shards import Corpus
from nano_pretrain.recipe.errors import UserError


def check_corpus(checkpoint: Path, corpus: Corpus, what: str) -> None:
    """Refuse a corpus in which something is not as the checkpoint records it; imported weights record none.

    Args:
        checkpoint: a whole checkpoint.
        corpus: to go on with.
        what: was trained, in the message.

    Raises:
        UserError: something has changed or is gone; the message names it.
    """
    manifest = read_manifest(checkpoint)
    if manifest is not None and (change := _change(manifest, corpus)):
        raise UserError(
            f"data.path: the shards in {corpus.path} are not those that {what} was trained on: {change}; "
            "restore them or choose another run.name"
        )


def _change(manifest: Manifest, corpus: Corpus) -> str | None:
    if manifest.weights_only:
        return None
    if manifest.shards is None or corpus.record is None:
        return None if manifest.corpus == corpus.fingerprint else "the fingerprint has changed"
    return first_change(manifest.shards, corpus.record)


def check_run_corpus(run_dir: Path, corpus: Corpus) -> None:
    """`check_corpus` for every checkpoint that the run may go on with: the newest may turn out to be damaged.

    Raises:
        UserError: see there.
    """
    for checkpoint in whole_checkpoints(run_dir):
        check_corpus(checkpoint, corpus, f"the run in {run_dir}")


def check_order(run_dir: Path, curriculum: Curriculum) -> None:
    """Refuse shards that were added after the run had begun to read the others again.

    Args:
        run_dir: directory of the run; `check_run_corpus` has passed its checkpoints.
        curriculum: what the run reads with the corpus as it is now.

    Raises:
        UserError: what the run has read would not have been read; the message names the source.
    """
    for checkpoint in whole_checkpoints(run_dir):
        manifest = read_manifest(checkpoint)
        if manifest is None or manifest.shards is None:
            continue
        reordered = curriculum.reordered(generation_tokens(manifest.shards), manifest.tokens)
        if reordered:
            raise UserError(
                f"data.path: source {reordered[0]} has shards that were added after the run in {run_dir} had begun to "
                f"read the others again (by {manifest.tokens:,} tokens): they would change what comes next; "
                "give data.path a corpus without them, or choose another run.name"
            )


def added_since(manifest: Manifest, corpus: Corpus) -> str:
    """Training tokens that each source has more than when a checkpoint was written, in words; empty if none has."""
    if manifest.shards is None:
        return ""
    then = {name: sum(tokens) for name, tokens in generation_tokens(manifest.shards).items()}
    return in_words(added_tokens(then, {name: stream.tokens for name, stream in corpus.train.items()}))
