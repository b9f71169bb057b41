"""Ranks that are all on this machine: how they find each other, as torchrun would tell them."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    """A TCP port of this machine on which nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environments(count: int) -> list[dict[str, str]]:
    """The environment of each of so many ranks: that of this process, and what torchrun adds."""
    common = os.environ | {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
