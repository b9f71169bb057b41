"""The words of the Metal Shading Language."""

from __future__ import annotations

from collections.abc import Mapping

from kernelgen.ir.expr import WordTable
from kernelgen.targets.base import Argument
from kernelgen.targets.printer import Dialect
from kernelgen.targets.simt import SPREADS, hex_words, table_type

MEMORY = Dialect(
    {
        "constant.f32": "{x}f",
        "constant.u32": "{x}u",
        "constant.least": "(-2147483647 - 1)",
        "constant.special": "as_type<float>({x})",
        "select": "({condition} ? {a} : {b})",
        "blend": "({condition} ? {a} : {b})",
        "cast.i32>f32": "f32({x})",
        "cast.u32>f32": "f32({x})",
        "cast.i32>u32": "u32({x})",
        "cast.u32>i32": "i32({x})",
        "cast.f32>i32": "i32({x})",
        "cast.f32>u32": "u32({x})",
        "cast.bool>i32": "i32({x})",
        "cast.bool>u32": "u32({x})",
        "cast.bool>f32": "f32({x})",
        "bitcast.i32>f32": "as_type<float>({x})",
        "bitcast.u32>f32": "as_type<float>({x})",
        "bitcast.f32>i32": "as_type<int>({x})",
        "bitcast.f32>u32": "as_type<uint>({x})",
        "bitcast.i32>u32": "as_type<uint>({x})",
        "bitcast.u32>i32": "as_type<int>({x})",
        "min": "min({a}, {b})",
        "max": "max({a}, {b})",
        "call.abs": "fabs({x})",
        # without the prefix these are as fast, and as wrong, as the compiler's options allow;
        # there is no erf
        **{
            f"call.{n}": f"precise::{n}({{x}})"
            for n in ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos")
        },
        "not": "!({x})",
        "table": "{table}[{index}]",
        "lookup": "lookup({table}, {index})",
        "spread1": "spread1({x})",
        **SPREADS,
        "negate": "negate_bytes({x}, {bits})",
        "element": "{name}[{index}]",
        "fetch.u8.1": "i32({buffer}[{address}])",
        "fetch.i8.1": "i32(as_type<char>({buffer}[{address}]))",
        "fetch.u16.1": "i32(u16_bytes({buffer} + ({address})))",
        "fetch.u16.2": "i32(u16_aligned({buffer} + ({address})))",
        "fetch.i16.1": "i32(as_type<short>(u16_bytes({buffer} + ({address}))))",
        "fetch.i16.2": "i32(as_type<short>(u16_aligned({buffer} + ({address}))))",
        "fetch.u32.1": "u32_bytes({buffer} + ({address}))",
        "fetch.u32.2": "u32_halves({buffer} + ({address}))",
        "fetch.u32.4": "u32_aligned({buffer} + ({address}))",
        "fetch.f16.1": "f32(as_type<half>(u16_bytes({buffer} + ({address}))))",
        "fetch.f16.2": "f32(as_type<half>(u16_aligned({buffer} + ({address}))))",
        "fetch.f32.1": "as_type<float>(u32_bytes({buffer} + ({address})))",
        "fetch.f32.2": "as_type<float>(u32_halves({buffer} + ({address})))",
        "fetch.f32.4": "as_type<float>(u32_aligned({buffer} + ({address})))",
    },
    operators={"//": "/"},
)

_TYPES = {
    "f32": "float", "f16": "half", "bf16": "bfloat", "u32": "uint", "i32": "int", "u8": "uchar",
    "i8": "char", "f32x4": "float4", "f16x4": "half4", "bf16x4": "bfloat4",
}  # fmt: skip

#: what a kernel may ask for of its place in the grid: the parameter, and its attribute
_PLACE = (
    ("uint thread", "thread_index_in_threadgroup"),
    ("uint2 group_id", "threadgroup_position_in_grid"),
    ("uint2 groups", "threadgroups_per_grid"),
)
_SUBGROUP_PLACE = (
    ("uint lane", "thread_index_in_simdgroup"),
    ("uint subgroup", "simdgroup_index_in_threadgroup"),
    ("uint subgroups", "simdgroups_per_threadgroup"),
)


class MetalWords:
    """The statements of the Metal Shading Language (see kernelgen.targets.simt.Words)."""

    def constant(self, name: str, value: int) -> str:
        """A u32 known when the kernel is compiled."""
        return f"#define {name} {value}u"

    def table(self, name: str, values: tuple[int, ...] | tuple[float, ...]) -> str:
        """A table in constant memory."""
        if isinstance(values, WordTable):
            return f"constant uint {name}[{len(values)}] = {{{hex_words(values)}}};"
        listed = ", ".join(map(repr, values)).replace("inf", "INFINITY").replace("nan", "NAN")
        return f"constant {_TYPES[table_type(values)]} {name}[{len(values)}] = {{{listed}}};"

    def kernel(
        self,
        entry: str,
        arguments: tuple[Argument, ...],
        threads: int,
        shared: Mapping[str, tuple[str, int]],
        features: tuple[str, ...],
    ) -> str:
        """The head of a kernel."""
        parameters = []
        for number, one in enumerate(arguments):
            if one.role == "size":
                declared = f"constant uint &{one.name}"
            else:
                const = "const " if one.role == "in" else ""
                declared = f"device {const}{_TYPES[one.dtype]} *{one.name}"
            parameters.append(f"{declared} [[buffer({number})]]")
        place = _PLACE + (_SUBGROUP_PLACE if {"subgroups", "matrix"} & set(features) else ())
        parameters += [f"{declared} [[{attribute}]]" for declared, attribute in place]
        lines = [
            f"[[max_total_threads_per_threadgroup({threads})]]",
            f"kernel void {entry}(",
            *(f"    {one}," for one in parameters[:-1]),
            f"    {parameters[-1]}) {{",
            *(
                f"    threadgroup {_TYPES[t]} {name}[{count}];"
                for name, (t, count) in shared.items()
            ),
            "    const uint group_x = group_id.x, group_y = group_id.y;",
            "    const uint groups_x = groups.x, groups_y = groups.y;",
        ]
        return "\n".join(lines)

    def function(self, name: str, parameters: tuple[str, ...]) -> str:
        """The head of a function of f32."""
        return f"static inline float {name}({', '.join(f'float {one}' for one in parameters)}) {{"

    def let(self, dtype: str, name: str, value: str) -> str:
        """A value that does not change."""
        return f"const {_TYPES[dtype]} {name} = {value};"

    def var(self, dtype: str, name: str, value: str) -> str:
        """A variable."""
        return f"{_TYPES[dtype]} {name} = {value};"

    def array(self, dtype: str, name: str, count: int) -> str:
        """An array of one thread, all zero."""
        return f"{_TYPES[dtype]} {name}[{count}] = {{0}};"

    def repeat(self, name: str, start: str | int, stop: str | int, step: str | int = 1) -> str:
        """The head of a loop over a u32."""
        following = f"{name}++" if step == 1 else f"{name} += {step}"
        return f"for (uint {name} = {start}; {name} < {stop}; {following}) {{"

    def barrier(self) -> str:
        """All threads of a threadgroup meet."""
        return "threadgroup_barrier(mem_flags::mem_threadgroup);"
