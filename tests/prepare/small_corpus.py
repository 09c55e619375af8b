"""A corpus of a moment: a wheel of made-up text, the corpus file that pins it, and a recipe that uses them."""

from __future__ import annotations

import hashlib
import json
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nano_pretrain.recipe.schema import Recipe

SYLLABLES = ["ba", "do", "ki", "lu", "me", "no", "pa", "ri", "su", "ta", "ve", "wo", "xi", "fra", "gle", "sté", "語"]
WHEEL_NAME = "prose-1.0-py3-none-any.whl"
VOCAB_SIZE = 400
MIN_TOKENS, CHUNK_TOKENS = 400, 40


def prose(rng: random.Random, words: int) -> str:
    """Sentences of invented words."""
    tokens = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(words)]
    return " ".join(token.capitalize() + "." if number % 9 == 8 else token for number, token in enumerate(tokens))


def members(documents: int = 120, seed: int = 0) -> dict[str, str]:
    """Files of a wheel: notes, and conversations in YAML; some faulty, some twice, some nearly twice."""
    rng = random.Random(seed)
    files = {f"prose/notes/{number:03}.txt": prose(rng, rng.randint(30, 300)) for number in range(documents)}
    files["prose/notes/copy.txt"] = files["prose/notes/000.txt"].replace(" ", "\n") + "  \n\n"
    files["prose/notes/short.txt"] = "ba do"
    files["prose/notes/binary.txt"] = prose(rng, 50) + "\x00\x01\x02"
    files["prose/notes/special.txt"] = f"{prose(rng, 40)} </s> is written here, and <s> too. {prose(rng, 40)}"
    talks = [[prose(rng, 12) for _ in range(4)] for _ in range(documents)]
    files["prose/talk/all.yml"] = yaml.safe_dump({"conversations": talks}, allow_unicode=True)
    return files


def write_wheel(path: Path, files: Mapping[str, str]) -> str:
    """Write a wheel that pip accepts; returns its SHA-256."""
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, text in {**files, **metadata}.items():
            archive.writestr(zipfile.ZipInfo(member), text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def corpus_content(sha256: str) -> dict[str, Any]:
    """A corpus file of two sources in one package, and one derived from them."""
    package = {"version": "1.0", "file": WHEEL_NAME, "sha256": sha256, "licence": "MIT"}
    common = {"package": "prose", "licence": "made by a test"}
    notes = {"category": "code", "extractor": "text_files", "arguments": {"include": ["prose/notes/*.txt"]}}
    talk = {"category": "general_sft", "extractor": "chat_yaml", "arguments": {"include": ["prose/talk/*.yml"]}}
    derived = {"long": {"parents": ["notes"], "min_tokens": MIN_TOKENS, "chunk_tokens": CHUNK_TOKENS}}
    sources = {"notes": common | notes, "talk": common | talk}
    return {"packages": {"prose": package}, "sources": sources, "derived": derived}


def small_recipe(directory: Path, files: Mapping[str, str] | None = None) -> Recipe:
    """A recipe whose package already lies in its cache, in `directory`."""
    cache = directory / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    sha256 = write_wheel(cache / WHEEL_NAME, members() if files is None else files)
    (directory / "corpus.yaml").write_text(json.dumps(corpus_content(sha256)))
    return recipe_in(directory)


def recipe_in(directory: Path) -> Recipe:
    """The recipe of `small_recipe`, for a directory that it has filled."""
    recipe = Recipe()
    recipe.model.vocab_size = VOCAB_SIZE
    recipe.data.corpus = str(directory / "corpus.yaml")
    recipe.data.path = str(directory / "prepared")
    recipe.data.cache_dir = str(directory / "packages")
    recipe.data.heldout_share = 0.05
    return recipe


def tree_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file below `path`."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
