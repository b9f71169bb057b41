"""The words of WGSL, the shading language of WebGPU."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kernelgen.ir.expr import WordTable
from kernelgen.targets.base import Argument
from kernelgen.targets.codebook import CODEBOOK
from kernelgen.targets.printer import Dialect
from kernelgen.targets.simt import SPREADS, table_type

MEMORY = Dialect(
    {
        "constant.f32": "{x}f",
        "constant.u32": "{x}u",
        "constant.least": "(-2147483647 - 1)",
        "constant.special": "bits_f32({x})",
        "shift": "u32({x})",
        "select": "select({b}, {a}, {condition})",
        "blend": "select({b}, {a}, {condition})",
        "cast.i32>f32": "f32({x})",
        "cast.u32>f32": "f32({x})",
        "cast.i32>u32": "u32({x})",
        "cast.u32>i32": "i32({x})",
        "cast.f32>i32": "i32({x})",
        "cast.f32>u32": "u32({x})",
        "cast.bool>i32": "i32({x})",
        "cast.bool>u32": "u32({x})",
        "cast.bool>f32": "f32({x})",
        # not bitcast<f32>, which must be finite where it is of a constant
        "bitcast.i32>f32": "bits_f32(u32({x}))",
        "bitcast.u32>f32": "bits_f32({x})",
        "bitcast.f32>i32": "bitcast<i32>({x})",
        "bitcast.f32>u32": "bitcast<u32>({x})",
        "bitcast.i32>u32": "u32({x})",
        "bitcast.u32>i32": "i32({x})",
        "min": "min({a}, {b})",
        "max": "max({a}, {b})",
        # sinh / cosh, which some drivers make of it, overflow
        "call.tanh": "tanh(clamp({x}, -10.0f, 10.0f))",
        "call.rsqrt": "inverseSqrt({x})",
        **{f"call.{n}": f"{n}({{x}})" for n in ("exp", "log", "sqrt", "sin", "cos", "abs")},
        "not": "!({x})",
        "constant.True": "true",
        "constant.False": "false",
        "table": "{table}_of({index})",
        "lookup": "{table}_lookup({index})",
        "spread1": "spread1({x})",
        **SPREADS,
        "negate": "negate_bytes({x}, {bits})",
        "element": "{name}[{index}]",
        "fetch.u8.1": "load_u8{suffix}({address})",
        "fetch.i8.1": "load_i8{suffix}({address})",
        "fetch.u16.1": "i32(load_u16{suffix}({address}))",
        "fetch.u16.2": "i32(load_u16{suffix}({address}))",
        "fetch.i16.1": "(i32(load_u16{suffix}({address}) << 16u) >> 16u)",
        "fetch.i16.2": "(i32(load_u16{suffix}({address}) << 16u) >> 16u)",
        "fetch.u32.1": "load_u32{suffix}({address})",
        "fetch.u32.2": "load_u32{suffix}({address})",
        "fetch.u32.4": "{buffer}[({address}) / 4u]",
        "fetch.f16.1": "load_f16{suffix}({address})",
        "fetch.f16.2": "load_f16{suffix}({address})",
        "fetch.f32.1": "bitcast<f32>(load_u32{suffix}({address}))",
        "fetch.f32.2": "bitcast<f32>(load_u32{suffix}({address}))",
        "fetch.f32.4": "bitcast<f32>({buffer}[({address}) / 4u])",
    },
    operators={"//": "/"},
)


_SUBGROUP_INPUTS = (
    "    @builtin(subgroup_invocation_id) lane: u32, @builtin(subgroup_id) subgroup: u32,",
    "    @builtin(num_subgroups) subgroups: u32,",
)


class WgslWords:
    """The statements of WGSL (see kernelgen.targets.simt.Words)."""

    def constant(self, name: str, value: int) -> str:
        """A u32 known when the kernel is compiled."""
        return f"const {name} = {value}u;"

    def table(self, name: str, values: tuple[int, ...] | tuple[float, ...]) -> str:
        """A table, and functions that look up one value and, of bytes, four.

        Floats are kept as bits: a constant must be finite.  Words are an argument.
        """
        if isinstance(values, WordTable):
            return f"fn {name}_of(i: i32) -> u32 {{ return {CODEBOOK}[i]; }}"
        if table_type(values) == "f32":
            bits = ", ".join(f"0x{n:08X}u" for n in np.array(values, np.float32).view(np.uint32))
            return (
                f"var<private> {name} = array<u32, {len(values)}>({bits});\n"
                f"fn {name}_of(i: i32) -> f32 {{ return bitcast<f32>({name}[i]); }}"
            )
        bytes_ = ", ".join(f"{name}_of(i32((x >> {8 * n}u) & 15u))" for n in range(4))
        return (
            f"var<private> {name} = array<i32, {len(values)}>({', '.join(map(str, values))});\n"
            f"fn {name}_of(i: i32) -> i32 {{ return {name}[i]; }}\n"
            f"fn {name}_lookup(x: u32) -> u32 {{ return pack_bytes({bytes_}); }}"
        )

    def kernel(
        self,
        entry: str,
        arguments: tuple[Argument, ...],
        threads: int,
        shared: Mapping[str, tuple[str, int]],
        features: tuple[str, ...],
    ) -> str:
        """Bindings in the order of the arguments, the sizes in a uniform behind them, the head."""
        lines = []
        buffers = [a for a in arguments if a.role != "size"]
        sizes = [a.name for a in arguments if a.role == "size"]
        for number, one in enumerate(buffers):
            # bytes are bound as words: the smallest thing that storage holds
            dtype = "u32" if one.dtype == "u8" else one.dtype
            access = "read" if one.role in ("in", "table") else "read_write"
            lines.append(
                f"@group(0) @binding({number}) var<storage, {access}> {one.name}: array<{dtype}>;"
            )
        lines += [
            f"struct Sizes {{ {', '.join(f'{name}: u32' for name in sizes)} }}",
            f"@group(0) @binding({len(buffers)}) var<uniform> sizes: Sizes;",
            *(f"var<workgroup> {n}: array<{t}, {c}>;" for n, (t, c) in shared.items()),
            "",
            f"@compute @workgroup_size({threads}, 1, 1)",
            f"fn {entry}(@builtin(local_invocation_id) local_id: vec3u,",
            *_SUBGROUP_INPUTS * ("subgroups" in features),
            "    @builtin(workgroup_id) group_id: vec3u, @builtin(num_workgroups) groups: vec3u) {",
            "    let thread = local_id.x; let group_x = group_id.x; let group_y = group_id.y;",
            "    let groups_x = groups.x; let groups_y = groups.y;",
            "    " + " ".join(f"let {name} = sizes.{name};" for name in sizes),
        ]
        return "\n".join(lines)

    def function(self, name: str, parameters: tuple[str, ...]) -> str:
        """The head of a function of f32."""
        return f"fn {name}({', '.join(f'{one}: f32' for one in parameters)}) -> f32 {{"

    def let(self, dtype: str, name: str, value: str) -> str:
        """A value that does not change."""
        return f"let {name}: {dtype} = {value};"

    def var(self, dtype: str, name: str, value: str) -> str:
        """A variable."""
        return f"var {name}: {dtype} = {value};"

    def array(self, dtype: str, name: str, count: int) -> str:
        """An array of one thread, all zero."""
        return f"var {name} = array<{dtype}, {count}>();"

    def repeat(self, name: str, start: str | int, stop: str | int, step: str | int = 1) -> str:
        """The head of a loop over a u32."""
        first = f"{start}u" if isinstance(start, int) else start
        following = f"{name}++" if step == 1 else f"{name} += {step}"
        return f"for (var {name}: u32 = {first}; {name} < {stop}; {following}) {{"

    def barrier(self) -> str:
        """All threads of a group meet."""
        return "workgroupBarrier();"
