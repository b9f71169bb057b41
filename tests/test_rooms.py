"""The architecture, held: every file under kernelgen/ keeps to its room.

Each rule is a function from a tree (path below kernelgen/ -> text) to the sentences that it has to
say about it.  It must have none about the tree that is here, and some about a snippet that breaks
it.  docs/design.md has the table of rooms.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from kernelgen.ir.formats import FORMATS

PACKAGE = Path(__file__).resolve().parent.parent / "kernelgen"

Tree = dict[str, str]

#: Rooms by level.  A room imports from lower levels, and from its own as long as no circle arises.
#: "targets.*" is any one target, "" is kernelgen/__init__.py.
LEVELS = (
    ("errors", "emulator"),
    ("arrays", "ir", "recording"),
    ("config", "problem", "quantizer", "tensor", "gguf_reader", "gguf_files", "checkpoints"),
    ("targets.printer",),
    ("targets.base",),
    ("targets.codebook",),
    ("targets.attention", "targets.driver", "targets.maps", "targets.package"),
    # what several targets share
    (
        "targets.c_family",
        "targets.simt",
        "targets.simt_attention",
        "targets.simt_maps",
        "targets.device",
        "targets.emulated",
        "targets.device_package",
    ),
    ("targets.resident",),
    ("targets.*",),
    ("targets",),
    ("generate", "tuner"),
    ("dispatch",),
    (
        "",
        "__main__",
        "api",
        "api_attention",
        "api_blocks",
        "api_fused",
        "accuracy",
        "api_maps",
        "api_rows",
        "bench",
        "cli",
        "demo",
        "files",
        "kv_cache",
        "models",
        "packages",
        "starter",
        "torch",
        "vectors",
        "verify",
        "verify_attention",
        "verify_epilogue",
        "verify_maps",
    ),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SHARED_BY_TARGETS = (
    "attention", "base", "c_family", "codebook", "printer", "maps", "simt", "simt_attention",
    "simt_maps", "driver", "device", "device_package", "emulated", "package", "resident",
)  # fmt: skip
TARGETS_OWN = ("targets/__init__.py", *(f"targets/{name}.py" for name in SHARED_BY_TARGETS))

#: formats that are also the names of plain types
PLAIN_FORMATS = {"f32", "f16", "bf16"}
FORMAT_PATTERN = re.compile(
    "|".join(
        [
            r"q[2-8]_[0-9k]|iq[1-4]|mxfp4|nvfp4|tq[12]_0",
            *(re.escape(f.name) for f in FORMATS if f.name.lower() not in PLAIN_FORMATS),
        ]
    ),
    re.IGNORECASE,
)

#: languages and APIs that may become targets, known by words that mean nothing else
LANGUAGES = frozenset({"cuda", "hlsl", "metal", "opencl", "triton", "wgsl"})
#: packages that touch a device
DRIVERS = frozenset({"Metal", "cupy", "mlx", "objc", "pyopencl", "torch", "triton", "wgpu"})

#: modules of the IR that define the plain records of arrays which runtimes give back
RECORDS = frozenset({"kernelgen.ir.ops"})

#: besides what the user says: files have quirks of single types
MAY_NAME_FORMATS = ("gguf_files", "gguf_reader", "checkpoints", *LEVELS[-1])

MAX_LINES = 600


def kernelgen_tree() -> Tree:
    """Every file that belongs to the package, but what the tuner measured: data, which has to say
    what it is about."""
    return {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and path.parent.name != "presets"
    }


def python_files(tree: Tree) -> Iterator[tuple[str, ast.Module]]:
    for path, text in tree.items():
        if path.endswith(".py"):
            yield path, ast.parse(text, path)


# ---- imports --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """`module` imports `what`; `late` where a function does it, or only the type checker."""

    path: str
    line: int
    module: str
    what: str
    late: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.what}"


def module_of(path: str) -> str:
    """The dotted name of a file: "kernelgen.ir.expr", "kernelgen" for __init__.py."""
    parts = ["kernelgen", *PurePosixPath(path).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The room of one of kernelgen's modules, as `LEVELS` names it."""
    parts = module.split(".")[1:]
    if parts[:1] == ["targets"] and len(parts) > 1 and parts[1] not in SHARED_BY_TARGETS:
        return "targets.*"
    return ".".join(parts[:2] if parts[:1] == ["targets"] else parts[:1])


def target_of(path: str) -> str | None:
    """The target whose folder a file is in."""
    parts = PurePosixPath(path).parts
    return parts[1] if len(parts) > 2 and parts[0] in ("targets", "templates") else None


def imports(tree: Tree) -> list[Import]:
    """All imports of all modules, those in functions and under TYPE_CHECKING too."""
    modules = {module_of(path) for path in tree if path.endswith(".py")}
    found: list[Import] = []
    for path, root in python_files(tree):
        module = module_of(path)
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]

        def visit(node: ast.AST, late: bool, here: tuple[str, str, str]) -> None:
            path, module, package = here
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, base] if base else above)
                for alias in node.names:  # `from package import module` imports the module
                    inner = f"{base}.{alias.name}"
                    if inner == "kernelgen.__version__":
                        continue  # a constant, there before anything else is imported
                    names.append(inner if inner in modules else base)
            elif isinstance(node, ast.Call) and node.args:
                called = ast.unparse(node.func).rpartition(".")[2]
                first = node.args[0]
                if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                    names = [str(first.value)]
            found.extend(Import(path, node.lineno, module, n, late) for n in dict.fromkeys(names))
            late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            late = late or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
            for child in ast.iter_child_nodes(node):
                visit(child, late, here)

        visit(root, False, (path, module, package))
    return found


def rooms_known(tree: Tree) -> list[str]:
    """Every module is in a room that has a place in the order."""
    return [
        f"{path} is in no room; put it into one, or give a new room its place in LEVELS"
        for path in tree
        if path.endswith(".py")
        and (
            room_of(module_of(path)) not in LEVEL
            # a target is a folder
            or (re.fullmatch(r"targets/\w+\.py", path) and path not in TARGETS_OWN)
        )
    ]


def import_order(tree: Tree) -> list[str]:
    """Imports point one way."""
    wrong = []
    for one in imports(tree):
        if one.what != "kernelgen" and not one.what.startswith("kernelgen."):
            continue
        here, there = LEVEL.get(room_of(one.module)), LEVEL.get(room_of(one.what))
        if here is not None and there is not None and there > here:
            wrong.append(f"{one}, which stands above it")
    return wrong


def import_circles(tree: Tree) -> list[str]:
    """No module needs itself to be imported first."""
    modules = {module_of(path) for path in tree if path.endswith(".py")}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for one in imports(tree):
        if not one.late and one.what in modules:
            graph[one.module].add(one.what)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["modules import each other in a circle: " + " <- ".join(error.args[1])]
    return []


def targets_apart(tree: Tree) -> list[str]:
    """No target imports another."""
    return [
        f"{one}, another target"
        for one in imports(tree)
        if one.what.startswith("kernelgen.targets.")
        and room_of(one.module) == room_of(one.what) == "targets.*"
        and one.module.split(".")[2] != one.what.split(".")[2]
    ]


def drivers_late(tree: Tree) -> list[str]:
    """Drivers are imported inside functions of a target's runtime.py, nowhere else; but what plugs
    into torch, which only users import, begins with it, and ranks speak through torch."""
    wrong = []
    for one in imports(tree):
        if one.path.startswith("torch/"):
            if one.what.partition(".")[0] in DRIVERS - {"torch"}:
                wrong.append(f"{one}, a driver, which only a target's runtime.py may")
        elif one.what.startswith("kernelgen.torch"):
            wrong.append(f"{one}, which only users import")
        elif one.what.partition(".")[0] in DRIVERS:
            if one.path.startswith("models/ranks/") and one.what.startswith("torch") and one.late:
                continue
            if not re.fullmatch(r"targets/\w+/runtime\.py", one.path):
                wrong.append(f"{one}, a driver, which only a target's runtime.py may")
            elif not one.late:
                wrong.append(f"{one} outside a function, so importing kernelgen touches a driver")
    return wrong


def spelling_apart(tree: Tree) -> list[str]:
    """Spelling knows no driver, and what drives a device knows neither the IR nor spelling."""
    wrong = []
    for one in imports(tree):
        name = PurePosixPath(one.path).name
        last = one.what.rpartition(".")[2]
        if target_of(one.path) is None or not one.path.startswith("targets/"):
            continue
        if name == "dialect.py" and last == "runtime":
            wrong.append(f"{one}: words do not depend on a driver")
        meaning = one.what.startswith("kernelgen.ir") and one.what not in RECORDS
        if name == "runtime.py" and (last == "dialect" or meaning):
            wrong.append(f"{one}: a driver moves bytes and knows nothing of what they mean")
    return wrong


# ---- words ----------------------------------------------------------------------------------


def lines_with(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        for match in pattern.finditer(line):
            yield number, match[0]


def formats_by_name(tree: Tree) -> list[str]:
    """Only descriptions of formats, and what the user says, name a format; comments count."""
    free = {
        path
        for path in tree
        if path.startswith("ir/formats/")
        or (path.endswith(".py") and room_of(module_of(path)) in MAY_NAME_FORMATS)
    }
    return [
        f"{path}:{line} names the format {word}"
        for path, text in tree.items()
        if path not in free
        for line, word in [*lines_with(text, FORMAT_PATTERN), *lines_with(path, FORMAT_PATTERN)]
    ]


def target_names(tree: Tree) -> set[str]:
    """Names of targets that are here, by their folders."""
    return {
        PurePosixPath(path).parts[1]
        for path in tree
        if re.fullmatch(r"targets/\w+/__init__\.py", path)
    }


def targets_by_name(tree: Tree) -> list[str]:
    """A target is named in its own folders and in the list of targets only; comments count.

    Names that mean nothing else ("opencl") are looked for in all text.  Others ("c", "numpy") are
    looked for as what code would compare with: a string that is exactly the name.  The emulator is
    about languages, and knows of no target; a runtime, that of a package too, calls a driver that
    has names of its own (torch.cuda).
    """
    wrong = []
    names = target_names(tree)
    for path, text in tree.items():
        if path == "targets/__init__.py" or path.startswith("emulator/"):
            continue
        runs = re.fullmatch(r"targets/\w+/runtime\.py|templates/\w+/package/driver\.py\.j2", path)
        others = [] if runs else sorted(LANGUAGES - {target_of(path)})
        pattern = re.compile("|".join(others), re.IGNORECASE)
        for line, word in lines_with(text, pattern) if others else ():
            wrong.append(f"{path}:{line} names the target {word}")
        if path.endswith(".py"):
            for node in ast.walk(ast.parse(text, path)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    name = node.value.lower()
                    if name in names - LANGUAGES - {target_of(path)}:
                        wrong.append(f'{path}:{node.lineno} names the target "{name}"')
    return wrong


def targets_listed(tree: Tree) -> list[str]:
    """The list of targets is explicit and complete."""
    root = ast.parse(tree.get("targets/__init__.py", "NAMES = ()"))
    listed: set[str] = set()
    for node in root.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            goals = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(goal, ast.Name) and goal.id == "NAMES" for goal in goals):
                listed = set(ast.literal_eval(node.value))
    here = target_names(tree)
    wrong = [
        f"targets/{name}/ is missing from NAMES in targets/__init__.py" for name in here - listed
    ]
    wrong += [
        f"NAMES in targets/__init__.py lists {name}, which has no folder" for name in listed - here
    ]
    return wrong


# ---- size -----------------------------------------------------------------------------------


def short_files(tree: Tree) -> list[str]:
    """A file is something one can hold in the head."""
    sizes = {path: len(text.splitlines()) for path, text in tree.items()}
    return [
        f"{path} has {size} lines, more than {MAX_LINES}; it holds more than one thing"
        for path, size in sizes.items()
        if size > MAX_LINES
    ]


RULES: tuple[Callable[[Tree], list[str]], ...] = (
    rooms_known,
    import_order,
    import_circles,
    targets_apart,
    drivers_late,
    spelling_apart,
    formats_by_name,
    targets_by_name,
    targets_listed,
    short_files,
)

# What each rule must object to: (rule, files).
NAMES_AB = {"targets/__init__.py": 'NAMES = ("a", "b")', "targets/a/__init__.py": ""}
BROKEN: tuple[tuple[Callable[[Tree], list[str]], Tree], ...] = (
    (rooms_known, {"util.py": ""}),
    (rooms_known, {"util/text.py": ""}),
    (rooms_known, {"targets/util.py": ""}),
    (import_order, {"errors.py": "from kernelgen.ir import expr"}),
    (import_order, {"ir/expr.py": "from kernelgen import config", "config.py": ""}),
    (import_order, {"ir/expr.py": "import kernelgen.targets.base"}),
    (import_order, {"ir/expr.py": "from .. import config", "config.py": ""}),
    (import_order, {"ir/a/expr.py": "from ...config import Config", "config.py": ""}),
    (import_order, {"ir/expr.py": "def f():\n    from kernelgen.api import matmul"}),
    (import_order, {"ir/expr.py": "if TYPE_CHECKING:\n    from kernelgen.config import Config"}),
    (import_order, {"ir/expr.py": "import importlib\nimportlib.import_module('kernelgen.api')"}),
    (import_order, {"config.py": "from kernelgen.targets.base import Target"}),
    (import_order, {"quantizer.py": "from kernelgen import open"}),
    (import_order, {"targets/base.py": "from kernelgen.targets.a import TARGET"}),
    (import_order, {"targets/a/runtime.py": "from kernelgen import targets", **NAMES_AB}),
    (import_order, {"targets/a/dialect.py": "from kernelgen.generate import generate"}),
    (import_order, {"targets/__init__.py": "from kernelgen.generate import generate"}),
    (import_order, {"generate.py": "from kernelgen.cli import main"}),
    (import_circles, {"config.py": "from kernelgen import problem",
                      "problem.py": "import kernelgen.config"}),
    (import_circles, {"ir/a.py": "from . import b", "ir/b.py": "from kernelgen.ir.a import x"}),
    (targets_apart, {"targets/a/dialect.py": "from kernelgen.targets.b.dialect import WORDS"}),
    (targets_apart, {"targets/a/dialect.py": "from ..b import dialect"}),
    (targets_apart, {"targets/a/runtime.py": "def f():\n    import kernelgen.targets.b.runtime"}),
    (drivers_late, {"targets/a/runtime.py": "import cupy"}),
    (drivers_late, {"targets/a/runtime.py": "try:\n    import torch.mps\nexcept ImportError: ..."}),
    (drivers_late, {"targets/a/runtime.py": "if TYPE_CHECKING:\n    import wgpu\nimport wgpu"}),
    (drivers_late, {"targets/a/dialect.py": "def f():\n    import pyopencl"}),
    (drivers_late, {"api.py": "def f(x):\n    import torch"}),
    (drivers_late, {"ir/expr.py": "from mlx.core import array"}),
    (drivers_late, {"torch/ops.py": "import cupy"}),
    (drivers_late, {"models/ranks/mesh.py": "import torch.distributed"}),
    (drivers_late, {"models/ranks/mesh.py": "def f():\n    import cupy"}),
    (drivers_late, {"api.py": "def f():\n    import kernelgen.torch"}),
    (spelling_apart, {"targets/a/dialect.py": "from kernelgen.targets.a import runtime",
                      "targets/a/runtime.py": ""}),
    (spelling_apart, {"targets/a/runtime.py": "from kernelgen.targets.a.dialect import WORDS"}),
    (spelling_apart, {"targets/a/runtime.py": "from kernelgen.ir.block import BlockFormat"}),
    (formats_by_name, {"templates/a/matmul.j2": '%% if format == "q4_K"'}),
    (formats_by_name, {"templates/a/matmul.j2": "// as Q6_K has it"}),
    (formats_by_name, {"targets/a/words.h": "/* dot_q8_0 */"}),
    (formats_by_name, {"targets/a/dialect.py": "# for IQ4 only"}),
    (formats_by_name, {"templates/a/mxfp4.j2": ""}),
    (formats_by_name, {"config.py": "WIDE = {'bf16', 'Q5_1'}"}),
    (formats_by_name, {"generate.py": "if fmt.name == 'mxfp4': ..."}),
    (targets_by_name, {"ir/expr.py": "# as in CUDA"}),
    (targets_by_name, {"config.py": "metal_tile = 8"}),
    (targets_by_name, {"problem.py": "'''for WGSL'''"}),
    (targets_by_name, {"quantizer.py": "OpenCL = 1"}),
    (targets_by_name, {"templates/shared.j2": "%# unlike HLSL"}),
    (targets_by_name, {"templates/triton/walk.j2": "// faster than cuda"}),
    (targets_by_name, {"targets/cuda/dialect.py": "x = 'wgsl'"}),
    (targets_by_name, {"api.py": "if target == 'a': ...", **NAMES_AB}),
    (targets_by_name, {"targets/b/dialect.py": "x = 'a'", **NAMES_AB}),
    (targets_listed, NAMES_AB),
    (targets_listed, {"targets/__init__.py": "NAMES = ()", "targets/a/__init__.py": ""}),
    (short_files, {"ir/expr.py": "x = 1\n" * (MAX_LINES + 1)}),
)  # fmt: skip

# What no rule may object to.
SOUND: Tree = {
    "__init__.py": "from kernelgen.errors import KernelgenError",
    "errors.py": "",
    "ir/expr.py": "from kernelgen.errors import KernelgenError\n'''metre, open, c, numpy'''",
    "ir/formats/made_up.py": "NAME = 'q4_K'",
    "config.py": "from kernelgen.ir.expr import Expr\nPLAIN = ('f32', 'f16', 'bf16')",
    "problem.py": "from kernelgen import config",
    "targets/__init__.py": "from kernelgen.targets.base import Target\nNAMES = ('a', 'cuda')",
    "targets/base.py": "from kernelgen.config import Config",
    "targets/a/__init__.py": "from . import dialect\nNAME = 'a'",
    "targets/a/dialect.py": "from kernelgen.targets.base import Dialect\nimport kernelgen.ir.expr",
    "targets/a/runtime.py": "def f():\n    import torch\nfrom kernelgen.ir.ops import Activations",
    "targets/cuda/__init__.py": "NAME = 'cuda'",
    "templates/cuda/matmul.j2": "%# CUDA",
    "templates/a/matmul.j2": "// f16 scale, bf16 sum",
    "models/ranks/mesh.py": "def f():\n    import torch.distributed",
    "generate.py": "from kernelgen import __version__, targets\nimport kernelgen.config",
    "cli.py": "from kernelgen.generate import generate\nEXAMPLE = 'q4_K'",
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_kernelgen_keeps_the_rule(rule: Callable[[Tree], list[str]]) -> None:
    assert rule(kernelgen_tree()) == []


@pytest.mark.parametrize(
    ("rule", "files"), BROKEN, ids=[f"{r.__name__}-{i}" for i, (r, _) in enumerate(BROKEN)]
)
def test_the_rule_can_fail(rule: Callable[[Tree], list[str]], files: Tree) -> None:
    assert rule(files) != []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_lets_sound_code_pass(rule: Callable[[Tree], list[str]]) -> None:
    assert rule(SOUND) == []


def test_every_rule_is_proven_able_to_fail() -> None:
    assert {rule for rule, _ in BROKEN} == set(RULES)


def test_the_tree_is_read() -> None:
    tree = kernelgen_tree()
    assert {"errors.py", "ir/expr.py", "py.typed"} <= set(tree)
    assert any(path.startswith("targets/") for path in tree)
