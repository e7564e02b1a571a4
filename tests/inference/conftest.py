"""Decoding is the same on every device: on CUDA it runs through kernels and recorded steps."""

import pytest
import torch

from tests.contract.settings import DEVICES

CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(DEVICES, "device", request.param)
    return str(request.param)
