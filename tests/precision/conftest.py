from collections.abc import Iterator

import pytest

from tests.kernels.implementations import using


# Of the module, since hypothesis enters a fixture once for all examples.
@pytest.fixture(scope="module", params=["plain", "native"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels in use."""
    with using(request.param):
        yield request.param
