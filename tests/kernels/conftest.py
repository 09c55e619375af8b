import pytest
import torch


@pytest.fixture(autouse=True)
def flush_denormals() -> None:
    """As every platform of the product runs."""
    torch.set_flush_denormal(True)
