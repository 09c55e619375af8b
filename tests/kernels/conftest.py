from collections.abc import Iterator

import pytest
import torch

from tests.kernels.implementations import using


@pytest.fixture(autouse=True)
def denormals_are_flushed(denormals_are_kept: None) -> None:
    """As on every CPU platform; `denormals_are_kept` ends it after the test."""
    torch.set_flush_denormal(True)


# Of the module, since hypothesis enters a fixture once for all examples; all tests of a module must ask for it.
@pytest.fixture(scope="module", params=["plain", "native"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels in use."""
    with using(request.param):
        yield request.param


@pytest.fixture
def plain() -> Iterator[None]:
    """The plain kernels, whatever a platform chose before."""
    with using("plain"):
        yield
