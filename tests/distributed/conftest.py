from pathlib import Path

import pytest

from tests.corpora import write_corpus
from tests.distributed.courses import write_start
from tests.distributed.layouts import Courses, course_recipe
from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="session")
def course_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("courses") / "corpus")


@pytest.fixture(scope="session")
def start(course_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights with which all courses begin."""
    path = tmp_path_factory.mktemp("start")
    run_ranks(write_start, 1, course_recipe("fp32", course_corpus), path)
    return path


@pytest.fixture(scope="session")
def courses(course_corpus: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Courses:
    """In FP32."""
    return Courses(course_recipe("fp32", course_corpus), start, tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="session")
def bf16_courses(course_corpus: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Courses:
    """In BF16."""
    return Courses(course_recipe("bf16", course_corpus), start, tmp_path_factory.mktemp("bf16"))
