"""The file that `kernelgen new-format` writes: a description that works, with comments."""

from __future__ import annotations

import keyword
import re

from kernelgen.errors import FormatError

_TEXT = '''"""The block format {name}: 32 codes of four bits, one scale.

Draw first where the bits of a block lie:

    qs[j]   7 6 5 4 | 3 2 1 0        j = 0..15
             x[j+16]   x[j]

Try it:

    import kernelgen, {module}
    kernelgen.register_format({module}.{constant})
    kernelgen.quantize(array, "{name}")        # arrays of floats, (N, K)

Where every command of kernelgen shall find it, name it in the pyproject.toml of a package:

    [project.entry-points."kernelgen.formats"]
    {name} = "{module}:{constant}"

Then `kernelgen list --format {name}` shows what there is for it, and `kernelgen verify --format
{name}` runs every kernel of it.  docs/add-a-format.md tells more.
"""

from kernelgen import BlockFormat

{constant} = BlockFormat(
    name="{name}",
    # elements of a block, and how many of them share a scale (a multiple of 4)
    block=32,
    group=32,
    # bytes of a block: what the fields take
    nbytes=18,
    # in the order of the bytes: u8 i8 u16 i16 u32 f16 f32, or type[count]
    fields={{"d": "f16", "qs": "u8[16]"}},
    # an element is scale(g) * (code(i) - bias) + offset(g), with g = i // group; the code of
    # element i is an integer that fits a byte
    code=lambda b, i: (b.qs[i % 16] >> (4 * (i // 16))) & 15,
    bias=8,
    scale=lambda b, g: b.d,
    # offset=lambda b, g: b.m,
    # integers that belong to a group, used as b.sc[g] in scale and offset
    # ints={{"sc": lambda b, g: b.scales[g] & 15}},
    source="where the format is defined",
)
'''


def starter(name: str) -> str:
    """The file's text, for a format of that name.

    FormatError   the name is none that a format can have
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or keyword.iskeyword(name.lower()):
        raise FormatError(
            f"a format was to be called {name!r}; a name is letters, digits and underscores, begins"
            " with a letter, and is no word of Python"
        )
    return _TEXT.format(name=name, module=name.lower(), constant=name.upper())
