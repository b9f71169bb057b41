"""The kernels as a project of Hugging Face's kernel-builder, for torch tensors on Apple's GPUs.

The layout is that of kernel-builder 0.17 (edition 5 of build.toml).  torch compiles the sources
when they are used, so that the build variant is the Python module itself: it is here, too.
"""

from __future__ import annotations

import base64
import hashlib
import json

from kernelgen.targets.device_package import torch_project
from kernelgen.targets.package import Content, Plan, refuse_binaries

#: name of the project, and of its Python module
NAME = "kernelgen_metal"


def package(plan: Plan) -> dict[str, Content]:
    """The files of the project, and of its build variant."""
    refuse_binaries(plan)
    made = torch_project(plan, NAME)
    root = f"torch-ext/{NAME}"
    made |= {f"{root}/kernels/{plan.entry(one)['file']}": one.source for one in plan.kernels}
    variant = {
        path.removeprefix(f"{root}/"): str(text)
        for path, text in made.items()
        if path.startswith(root)
    }
    digests = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(variant.items())
    }
    whole = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:7]
    metadata = {
        "name": NAME.replace("_", "-"), "id": f"_{NAME}_metal_{whole}", "version": 0,
        "license": "Apache-2.0", "python-depends": [], "backend": {"type": "metal"},
        "digest": {"algorithm": "sha256", "files": digests},
    }  # fmt: skip
    made |= {f"build/torch-metal/{path}": text for path, text in variant.items()}
    made["build/torch-metal/metadata.json"] = json.dumps(metadata, indent=1) + "\n"
    return made
