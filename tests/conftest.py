"""What every test gets: no network, one thread, Triton's interpreter where there is no GPU, the same seed."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

# Read once at import time by the libraries named in them, so they are set before those are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from tests.interpreter import hasten

        hasten()

# Shared machines are slow at times, so no deadline on an example; the same examples on every run.
settings.register_profile(
    "default", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fuzz", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def exports_read_by_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`export` reads its folders back as it does, in a process without hybridize, which is up at once."""
    from hybridize.model import export
    from tests.elsewhere import Parent

    parent = Parent(tmp_path_factory.mktemp("elsewhere"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "subprocess", parent)
        yield
    parent.end()


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """The process whose children are runs that tests may kill (`tests.distillation.runs.Server`)."""
    from tests.distillation import runs

    with runs.serving(tmp_path_factory.mktemp("serving") / "log") as process:
        yield process


def is_local(host: object) -> bool:
    """Whether a socket address's host is this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    return name is None or name in ("", "localhost", "::1", "::") or str(name).startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Fail a test that looks up a name or opens a connection outside this machine.

    `pytest.fail` raises what is no `Exception`, so that a library's retry loop does not swallow it.
    """

    def refuse(address: object) -> None:
        pytest.fail(f"a test may not use the network, and this one asked for {address!r}")

    def guarded(method: Any) -> Any:
        def call(self: socket.socket, *args: Any) -> Any:
            address = args[-1]
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
                refuse(address)
            return method(self, *args)

        return call

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_local(host):
            refuse(host)
        return real_lookup(host, *args, **kwargs)

    real_lookup = socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", lookup)
        yield
