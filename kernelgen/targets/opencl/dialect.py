"""The words of OpenCL C 1.2."""

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
        "constant.special": "as_float({x})",
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
        "bitcast.i32>f32": "as_float({x})",
        "bitcast.u32>f32": "as_float({x})",
        "bitcast.f32>i32": "as_int({x})",
        "bitcast.f32>u32": "as_uint({x})",
        "bitcast.i32>u32": "as_uint({x})",
        "bitcast.u32>i32": "as_int({x})",
        "min": "min({a}, {b})",
        "max": "max({a}, {b})",
        "call.abs": "fabs({x})",
        **{
            f"call.{n}": f"{n}({{x}})"
            for n in ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "erf")
        },
        "not": "!({x})",
        "table": "{table}[{index}]",
        "lookup": "lookup({table}, {index})",
        "spread1": "spread1({x})",
        **SPREADS,
        "negate": "negate_bytes({x}, {bits})",
        "element": "{name}[{index}]",
        "fetch.u8.1": "i32({buffer}[{address}])",
        "fetch.i8.1": "i32(as_char({buffer}[{address}]))",
        "fetch.u16.1": "i32(u16_bytes({buffer} + ({address})))",
        "fetch.u16.2": "i32(u16_aligned({buffer} + ({address})))",
        "fetch.i16.1": "i32(as_short(u16_bytes({buffer} + ({address}))))",
        "fetch.i16.2": "i32(as_short(u16_aligned({buffer} + ({address}))))",
        "fetch.u32.1": "u32_bytes({buffer} + ({address}))",
        "fetch.u32.2": "u32_halves({buffer} + ({address}))",
        "fetch.u32.4": "u32_aligned({buffer} + ({address}))",
        "fetch.f16.1": "f16_bytes({buffer} + ({address}))",
        "fetch.f16.2": "f16_aligned({buffer} + ({address}))",
        "fetch.f32.1": "as_float(u32_bytes({buffer} + ({address})))",
        "fetch.f32.2": "as_float(u32_halves({buffer} + ({address})))",
        "fetch.f32.4": "as_float(u32_aligned({buffer} + ({address})))",
    },
    operators={"//": "/"},
)

#: half precision is kept as bits: see words.cl
_TYPES = {
    "f32": "float", "f16": "ushort", "u32": "uint", "i32": "int", "u8": "uchar", "i8": "char",
}  # fmt: skip


class OpenCLWords:
    """The statements of OpenCL C (see kernelgen.targets.simt.Words)."""

    def constant(self, name: str, value: int) -> str:
        """A u32 known when the kernel is compiled."""
        return f"#define {name} {value}u"

    def table(self, name: str, values: tuple[int, ...] | tuple[float, ...]) -> str:
        """A table in constant memory."""
        if isinstance(values, WordTable):
            return f"__constant uint {name}[{len(values)}] = {{{hex_words(values)}}};"
        listed = ", ".join(map(repr, values)).replace("inf", "INFINITY").replace("nan", "NAN")
        return f"__constant {_TYPES[table_type(values)]} {name}[{len(values)}] = {{{listed}}};"

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
        for one in arguments:
            if one.role == "size":
                parameters.append(f"const uint {one.name}")
            else:
                const = "const " if one.role == "in" else ""
                parameters.append(f"__global {const}{_TYPES[one.dtype]} *restrict {one.name}")
        lines = [
            f"__kernel __attribute__((reqd_work_group_size({threads}, 1, 1)))",
            f"void {entry}({', '.join(parameters)}) {{",
            *(f"    __local {_TYPES[t]} {name}[{count}];" for name, (t, count) in shared.items()),
            "    const uint thread = get_local_id(0), group_x = get_group_id(0);",
            "    const uint group_y = get_group_id(1);",
            "    const uint groups_x = get_num_groups(0), groups_y = get_num_groups(1);",
        ]
        if "subgroups" in features:
            lines += [
                "    const uint lane = get_sub_group_local_id();",
                "    const uint subgroup = get_sub_group_id(), subgroups = get_num_sub_groups();",
            ]
        return "\n".join(lines)

    def function(self, name: str, parameters: tuple[str, ...]) -> str:
        """The head of a function of f32."""
        return f"static float {name}({', '.join(f'float {one}' for one in parameters)}) {{"

    def let(self, dtype: str, name: str, value: str) -> str:
        """A value that does not change."""
        return f"const {_TYPES[dtype]} {name} = {value};"

    def var(self, dtype: str, name: str, value: str) -> str:
        """A variable."""
        return f"{_TYPES[dtype]} {name} = {value};"

    def array(self, dtype: str, name: str, count: int) -> str:
        """An array of one thread, all zero.

        By a loop: PoCL 3.0 with LLVM 14 loses an initializer of two elements, and all other stores
        to such an array.
        """
        declared = f"{_TYPES[dtype]} {name}[{count}];"
        return f"{declared} for (uint e = 0; e < {count}u; e++) {{ {name}[e] = 0; }}"

    def repeat(self, name: str, start: str | int, stop: str | int, step: str | int = 1) -> str:
        """The head of a loop over a u32."""
        following = f"{name}++" if step == 1 else f"{name} += {step}"
        return f"for (uint {name} = {start}; {name} < {stop}; {following}) {{"

    def barrier(self) -> str:
        """All threads of a group meet."""
        return "barrier(CLK_LOCAL_MEM_FENCE);"
