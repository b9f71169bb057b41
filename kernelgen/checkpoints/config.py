"""What the files beside a checkpoint's tensors say of how it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernelgen.checkpoints.planes import read_json
from kernelgen.errors import FileError


@dataclass(frozen=True)
class Quantization:
    """How tensors are quantized.

    method  "gptq", "awq", ...; empty where nothing is said
    values  the object that says it
    path    the file it is in
    """

    method: str
    values: Mapping[str, Any]
    path: Path

    def text(self, key: str, default: str) -> str:
        """A string of the config."""
        return str(self._of(key, default, str))

    def integer(self, key: str, default: int) -> int:
        """An integer of the config."""
        return int(self._of(key, default, int))

    def _of(self, key: str, default: Any, kind: type) -> Any:
        found = self.values.get(key)
        if found is None:
            return default
        if not isinstance(found, kind) or isinstance(found, bool):
            raise FileError(
                f"{self.path} has {key} = {found!r}, where a value such as {default!r} was"
                " expected; correct the quantization config"
            )
        return found

    def error(self, seen: str, allowed: str) -> FileError:
        """A FileError about something that is not read."""
        return FileError(
            f"{self.path} says {self.method} with {seen}, and kernelgen reads {allowed}; convert"
            " the model again, or take its unquantized weights and kernelgen.quantize"
        )


def read_config(folder: Path) -> tuple[dict[str, Any], Quantization]:
    """The model's config (empty if there is none), and what is said of its quantization."""
    at = folder / "config.json"
    config = read_json(at) if at.exists() else {}
    for key in ("quantization_config", "compression_config"):
        inner = config.get("text_config")
        found = config.get(key) or (inner.get(key) if isinstance(inner, dict) else None)
        if found:
            return config, _quantization(found, at, "")
    # before transformers knew them, GPTQ and AWQ had files of their own
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        at = folder / name
        if at.exists():
            return config, _quantization(read_json(at), at, method)
    return config, Quantization("", {}, folder / "config.json")


def _quantization(values: Any, path: Path, default: str) -> Quantization:
    if not isinstance(values, dict):
        raise FileError(f"{path} has a quantization config that is no object; correct it")
    method = values.get("quant_method") or default
    if not method and any(key in values for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or not method:
        raise FileError(f"{path} has a quantization config without a quant_method; add it")
    if "q_group_size" in values:
        values = {"group_size": values["q_group_size"], **values}
    return Quantization(method.lower(), values, path)
