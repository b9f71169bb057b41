"""An ES module for WebGPU, a Python package over wgpu, and the sources for hosts in Rust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kernelgen.ir.block import BlockFormat
from kernelgen.targets.device_package import ITEM_BYTES, Binding, device_package
from kernelgen.targets.package import Arithmetic, Content, Plan, spelt

BINDING = Binding(
    package="kernelgen_wgsl",
    api="WebGPU",
    requires=("wgpu>=0.22",),
)

_JS = Arithmetic("Math.floor({a} / {b})", "Math.ceil({a} / {b})", "Math.min({a}, {b})")
_RUST = Arithmetic("{a} / {b}", "({a}).div_ceil({b})", "({a}).min({b})")


def package(plan: Plan) -> dict[str, Content]:
    """The files of the package."""
    made = device_package(plan, BINDING)
    context: dict[str, Any] = {
        "entries": plan.entries, "json": json.dumps, "buffers": _buffers, "sizes": _sizes,
        "groups": lambda e: [spelt(one, _JS) for one in e["launch"]["groups"]],
        "planes": _planes, "source": {k.entry: k.source for k in plan.kernels},
        "rules": json.dumps(json.loads(plan.dispatch)["rules"], indent=2),
        "formats": list(dict.fromkeys(
            k.format for k in plan.kernels if isinstance(k.subject, BlockFormat)
        )),
    }  # fmt: skip
    for name in ("index.js", "index.d.ts"):
        made[name] = plan.render(f"package/{name}")
    made["package.json"] = plan.render("package/package.json.j2")
    made["kernels.js"] = plan.render("package/kernels.js.j2", **context)
    made |= _crate(plan)
    return made


def _sizes(entry: Mapping[str, Any]) -> list[str]:
    return [a["name"] for a in entry["arguments"] if a["role"] == "size"]


def _buffers(entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, role and bytes of each buffer."""
    symbols = {**entry["symbols"], **entry["launch"]["symbols"]}
    known = {name: str(entry.get(name, 1)) for name in ("block", "group", "block_bytes")}
    found = []
    for one in entry["arguments"]:
        if one["role"] == "size":
            continue
        parts = [_number(symbols.get(s, s), known) for s in one["shape"]]
        found.append(
            (one["name"], one["role"], " * ".join((*parts, str(ITEM_BYTES[one["dtype"]]))))
        )
    return found


def _number(text: str, known: Mapping[str, str]) -> str:
    """An expression of sizes, with what is known of the format as numbers."""
    words = (known.get(word, word) for word in text.split(" "))
    return spelt(" ".join(words), _JS)


def _planes(entry: Mapping[str, Any]) -> list[dict[str, int]] | None:
    if entry["planes"] is None:
        return None
    return [{k: one[k] for k in ("offset", "bytes", "start")} for one in entry["planes"]]


def _crate(plan: Plan) -> dict[str, Content]:
    """Sources and choice for Rust."""
    made: dict[str, Content] = {
        f"rust/src/{e['file']}": k.source for e, k in zip(plan.entries, plan.kernels, strict=True)
    }
    made["rust/Cargo.toml"] = plan.render("package/Cargo.toml.j2")
    made["rust/src/lib.rs"] = plan.render(
        "package/lib.rs.j2", entries=plan.entries, rules=plan.rules, sizes=_sizes,
        json=json.dumps,
        known={e["entry"]: n for n, e in enumerate(plan.entries)},
        groups=lambda e: [spelt(one, _RUST) for one in e["launch"]["groups"]],
    )  # fmt: skip
    return made
