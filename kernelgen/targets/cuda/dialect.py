"""The words of CUDA C++."""

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
        "constant.special": "__uint_as_float({x})",
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
        "bitcast.i32>f32": "__int_as_float({x})",
        "bitcast.u32>f32": "__uint_as_float({x})",
        "bitcast.f32>u32": "__float_as_uint({x})",
        "bitcast.f32>i32": "__float_as_int({x})",
        "bitcast.i32>u32": "u32({x})",
        "bitcast.u32>i32": "i32({x})",
        "min": "min({a}, {b})",
        "max": "max({a}, {b})",
        "not": "!({x})",
        "table": "{table}[{index}]",
        "lookup": "lookup({table}, {index})",
        "spread1": "spread1({x})",
        **SPREADS,
        "negate": "negate_bytes({x}, {bits})",
        "element": "{name}[{index}]",
        "fetch.u8.1": "i32({buffer}[{address}])",
        "fetch.i8.1": "i32((signed char){buffer}[{address}])",
        "fetch.u16.1": "i32(u16_bytes({buffer} + ({address})))",
        "fetch.u16.2": "i32(u16_aligned({buffer} + ({address})))",
        "fetch.i16.1": "i32((short)u16_bytes({buffer} + ({address})))",
        "fetch.i16.2": "i32((short)u16_aligned({buffer} + ({address})))",
        "fetch.u32.1": "u32_bytes({buffer} + ({address}))",
        "fetch.u32.2": "u32_halves({buffer} + ({address}))",
        "fetch.u32.4": "u32_aligned({buffer} + ({address}))",
        "fetch.f16.1": "f16_to_f32(u16_bytes({buffer} + ({address})))",
        "fetch.f16.2": "f16_to_f32(u16_aligned({buffer} + ({address})))",
        "fetch.f32.1": "__uint_as_float(u32_bytes({buffer} + ({address})))",
        "fetch.f32.2": "__uint_as_float(u32_halves({buffer} + ({address})))",
        "fetch.f32.4": "__uint_as_float(u32_aligned({buffer} + ({address})))",
        "call.abs": "fabsf({x})",
        "call.rsqrt": "rsqrtf({x})",
        **{
            f"call.{n}": f"{n}f({{x}})" for n in ("exp", "log", "sqrt", "tanh", "sin", "cos", "erf")
        },
    },
    operators={"//": "/"},
)

#: names of types
TYPES = {
    "f32": "float", "u32": "unsigned int", "i32": "int",
    "u8": "unsigned char", "i8": "signed char",
}  # fmt: skip


def parameters(arguments: tuple[Argument, ...]) -> str:
    """The parameters of a kernel."""
    result = []
    for one in arguments:
        if one.role == "size":
            result.append(f"const unsigned int {one.name}")
        else:
            const = "const " if one.role == "in" else ""
            result.append(f"{const}{TYPES[one.dtype]} *__restrict__ {one.name}")
    return ", ".join(result)


class CudaWords:
    """The statements of CUDA C++ (see kernelgen.targets.simt.Words)."""

    def constant(self, name: str, value: int) -> str:
        """A u32 known when the kernel is compiled."""
        return f"#define {name} {value}u"

    def table(self, name: str, values: tuple[int, ...] | tuple[float, ...]) -> str:
        """A table in constant memory; short ones of bytes are filled up to 16 for `lookup`.

        Words are in global memory, which has a cache: threads look up different ones, and from
        constant memory would get them one after the other.
        """
        if isinstance(values, WordTable):
            return f"__device__ const unsigned int {name}[{len(values)}] = {{{hex_words(values)}}};"
        dtype, filled = TYPES[table_type(values)], (*values, *([0] * (16 - len(values))))
        kept = filled if table_type(values) == "i8" else values
        listed = ", ".join(map(str, kept))
        return f"__constant__ __align__(16) {dtype} {name}[{len(kept)}] = {{{listed}}};"

    def kernel(
        self,
        entry: str,
        arguments: tuple[Argument, ...],
        threads: int,
        shared: Mapping[str, tuple[str, int]],
        features: tuple[str, ...],
    ) -> str:
        """The head of a kernel."""
        lines = [
            # as many registers as leave room for 256 threads: by itself ptxas makes room for more
            # than that, and spills
            f'extern "C" __global__ void __launch_bounds__({threads}, {max(1, 256 // threads)})',
            f"{entry}({parameters(arguments)}) {{",
            *(f"    __shared__ {TYPES[t]} {name}[{count}];" for name, (t, count) in shared.items()),
            "    const unsigned int thread = threadIdx.x, group_x = blockIdx.x;",
            "    const unsigned int group_y = blockIdx.y;",
            "    const unsigned int groups_x = gridDim.x, groups_y = gridDim.y;",
        ]
        return "\n".join(lines)

    def function(self, name: str, parameters: tuple[str, ...]) -> str:
        """The head of a function of f32."""
        listed = ", ".join(f"float {one}" for one in parameters)
        return f"static __device__ __forceinline__ float {name}({listed}) {{"

    def let(self, dtype: str, name: str, value: str) -> str:
        """A value that does not change."""
        return f"const {TYPES[dtype]} {name} = {value};"

    def var(self, dtype: str, name: str, value: str) -> str:
        """A variable."""
        return f"{TYPES[dtype]} {name} = {value};"

    def array(self, dtype: str, name: str, count: int) -> str:
        """An array of one thread, all zero."""
        return f"{TYPES[dtype]} {name}[{count}] = {{0}};"

    def repeat(self, name: str, start: str | int, stop: str | int, step: str | int = 1) -> str:
        """The head of a loop over a u32."""
        following = f"{name}++" if step == 1 else f"{name} += {step}"
        return f"for (unsigned int {name} = {start}; {name} < {stop}; {following}) {{"

    def barrier(self) -> str:
        """All threads of a block meet."""
        return "__syncthreads();"
