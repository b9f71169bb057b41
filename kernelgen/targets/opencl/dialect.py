"""The words of OpenCL C 1.2."""

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
        **reinterpreted("as_float", "as_int", "as_uint", "as_char", "as_short"),
        "call.abs": "fabs({x})",
        **{
            f"call.{n}": f"{n}({{x}})"
            for n in ("exp", "log", "sqrt", "rsqrt", "tanh", "sin", "cos", "erf")
        },
        "fetch.f16.1": "f16_bytes({buffer} + ({address}))",
        "fetch.f16.2": "f16_aligned({buffer} + ({address}))",
    },
    operators=OPERATORS,
)

#: half precision is kept as bits: see words.cl
_TYPES = {
    "f32": "float", "f16": "ushort", "u32": "uint", "i32": "int", "u8": "uchar", "i8": "char",
}  # fmt: skip


class OpenCLWords(CFamilyWords):
    """The statements of OpenCL C (see kernelgen.targets.simt.Words)."""

    types = _TYPES

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

    def array(self, dtype: str, name: str, count: int) -> str:
        """An array of one thread, all zero.

        By a loop: PoCL 3.0 with LLVM 14 loses an initializer of two elements, and all other stores
        to such an array.
        """
        declared = f"{_TYPES[dtype]} {name}[{count}];"
        return f"{declared} for (uint e = 0; e < {count}u; e++) {{ {name}[e] = 0; }}"

    def barrier(self) -> str:
        """All threads of a group meet."""
        return "barrier(CLK_LOCAL_MEM_FENCE);"
