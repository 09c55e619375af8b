import pytest
import torch


@pytest.fixture(autouse=True)
def denormals_are_flushed(denormals_are_kept: None) -> None:
    """As on every CPU platform; `denormals_are_kept` ends it after the test."""
    torch.set_flush_denormal(True)
