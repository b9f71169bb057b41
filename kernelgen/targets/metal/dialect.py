"""The words of the Metal Shading Language."""

from __future__ import annotations

from collections.abc import Mapping

from kernelgen.ir.expr import WordTable
from kernelgen.targets.base import Argument
from kernelgen.targets.c_family import OPERATORS, WORDS, CFamilyWords, reinterpreted
from kernelgen.targets.printer import Dialect
from kernelgen.targets.simt import hex_words, table_type

MEMORY = Dialect(
    {
        **WORDS,
        **reinterpreted(
            "as_type<float>", "as_type<int>", "as_type<uint>", "as_type<char>", "as_type<short>"
        ),
        "call.abs": "fabs({x})",
        # without the prefix these are as fast, and as wrong, as the compiler's options allow;
        # there is no erf
        **{
            f"call.{n}": f"precise::{n}({{x}})"
            for n in ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos")
        },
        "fetch.f16.1": "f32(as_type<half>(u16_bytes({buffer} + ({address}))))",
        "fetch.f16.2": "f32(as_type<half>(u16_aligned({buffer} + ({address}))))",
    },
    operators=OPERATORS,
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


class MetalWords(CFamilyWords):
    """The statements of the Metal Shading Language (see kernelgen.targets.simt.Words)."""

    types = _TYPES

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

    def barrier(self) -> str:
        """All threads of a threadgroup meet."""
        return "threadgroup_barrier(mem_flags::mem_threadgroup);"
