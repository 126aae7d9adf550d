"""The first screen of the README, on every backend and source."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

import anyreap
from tests.harness import exits_with, sleeper

pytestmark = pytest.mark.anyio


async def test_a_pid_is_awaited(source: Any) -> None:
    """A child that anything started is handed in by its pid, and its end awaited."""
    async with anyreap.open_reaper(source=source) as reaper:
        status = await reaper.wait(exits_with(3))
    assert str(status) == "exited with code 3"


async def test_cancelled_block_ends_what_it_owns(source: Any) -> None:
    """A cancelled block shuts its owned child down, and leaves none."""
    with anyio.CancelScope() as scope:
        async with anyreap.open_reaper(source=source) as reaper:
            child = reaper.adopt(sleeper())
            scope.cancel()
    assert str(child.status) == "killed by SIGTERM"
