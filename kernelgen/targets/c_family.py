"""What the languages of devices that descend from C have in common: words, and statements."""

from __future__ import annotations

from typing import ClassVar

from kernelgen.targets.simt import SPREADS

#: words that are spelt alike; conversions, and what reads bytes, are functions of a target's own
WORDS = {
    "constant.f32": "{x}f",
    "constant.u32": "{x}u",
    "constant.least": "(-2147483647 - 1)",
    "select": "({condition} ? {a} : {b})",
    "blend": "({condition} ? {a} : {b})",
    **{f"cast.{a}>f32": "f32({x})" for a in ("i32", "u32", "bool")},
    **{f"cast.{a}>i32": "i32({x})" for a in ("f32", "u32", "bool")},
    **{f"cast.{a}>u32": "u32({x})" for a in ("f32", "i32", "bool")},
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
    "fetch.u16.1": "i32(u16_bytes({buffer} + ({address})))",
    "fetch.u16.2": "i32(u16_aligned({buffer} + ({address})))",
    "fetch.u32.1": "u32_bytes({buffer} + ({address}))",
    "fetch.u32.2": "u32_halves({buffer} + ({address}))",
    "fetch.u32.4": "u32_aligned({buffer} + ({address}))",
}

#: integer division; those that are divided are not negative
OPERATORS = {"//": "/"}


def reinterpreted(f32: str, i32: str, u32: str, i8: str, i16: str) -> dict[str, str]:
    """Words for bits that are read as another type, by the names of what does it."""
    return {
        "constant.special": f"{f32}({{x}})",
        "bitcast.i32>u32": f"{u32}({{x}})",
        "bitcast.u32>i32": f"{i32}({{x}})",
        "bitcast.f32>i32": f"{i32}({{x}})",
        "bitcast.f32>u32": f"{u32}({{x}})",
        "bitcast.i32>f32": f"{f32}({{x}})",
        "bitcast.u32>f32": f"{f32}({{x}})",
        "fetch.i8.1": f"i32({i8}({{buffer}}[{{address}}]))",
        "fetch.i16.1": f"i32({i16}(u16_bytes({{buffer}} + ({{address}}))))",
        "fetch.i16.2": f"i32({i16}(u16_aligned({{buffer}} + ({{address}}))))",
        "fetch.f32.1": f"{f32}(u32_bytes({{buffer}} + ({{address}})))",
        "fetch.f32.2": f"{f32}(u32_halves({{buffer}} + ({{address}})))",
        "fetch.f32.4": f"{f32}(u32_aligned({{buffer}} + ({{address}})))",
    }


class CFamilyWords:
    """Statements that are C's (see kernelgen.targets.simt.Words); `types` has names of types."""

    types: ClassVar[dict[str, str]]

    def constant(self, name: str, value: int) -> str:
        """A u32 known when the kernel is compiled."""
        return f"#define {name} {value}u"

    def let(self, dtype: str, name: str, value: str) -> str:
        """A value that does not change."""
        return f"const {self.types[dtype]} {name} = {value};"

    def var(self, dtype: str, name: str, value: str) -> str:
        """A variable."""
        return f"{self.types[dtype]} {name} = {value};"

    def array(self, dtype: str, name: str, count: int) -> str:
        """An array of one thread, all zero."""
        return f"{self.types[dtype]} {name}[{count}] = {{0}};"

    def repeat(self, name: str, start: str | int, stop: str | int, step: str | int = 1) -> str:
        """The head of a loop over a u32."""
        following = f"{name}++" if step == 1 else f"{name} += {step}"
        return f"for ({self.types['u32']} {name} = {start}; {name} < {stop}; {following}) {{"
