"""Configurations: what a walk leaves open.  Frozen dataclasses, with the choices beside the fields.

A configuration says how, never what: every legal one computes the same result.  What a device can
do is given as `Capabilities`, so that no rule here knows any device.
"""

from __future__ import annotations

from kernelgen.config.base import Capabilities, Config, NoConfig, choice
from kernelgen.config.cpu import RowTileConfig
from kernelgen.config.fragments import (
    BulkTileConfig,
    FragmentRowsConfig,
    FragmentTileConfig,
    WarpMatvecConfig,
)
from kernelgen.config.grids import (
    DotMatvecConfig,
    DotTileConfig,
    HalfTileConfig,
    MatvecConfig,
    ThreadsConfig,
    TileConfig,
)
from kernelgen.config.programs import (
    ProgramBlocksConfig,
    ProgramConfig,
    ProgramDotMatvecConfig,
    ProgramDotTileConfig,
    ProgramHalfTileConfig,
    ProgramMatvecConfig,
    ProgramRowsConfig,
    ProgramTileConfig,
)
from kernelgen.config.tiles import FloatTileMatmulConfig, TileAttentionConfig, TileMatmulConfig

__all__ = [
    "BulkTileConfig", "Capabilities", "Config", "DotMatvecConfig", "DotTileConfig",
    "FloatTileMatmulConfig", "FragmentRowsConfig", "FragmentTileConfig", "HalfTileConfig",
    "MatvecConfig", "NoConfig",
    "ProgramBlocksConfig", "ProgramConfig", "ProgramDotMatvecConfig", "ProgramDotTileConfig",
    "ProgramHalfTileConfig", "ProgramMatvecConfig", "ProgramRowsConfig", "ProgramTileConfig",
    "RowTileConfig", "ThreadsConfig", "TileAttentionConfig", "TileConfig", "TileMatmulConfig",
    "WarpMatvecConfig", "choice",
]  # fmt: skip
