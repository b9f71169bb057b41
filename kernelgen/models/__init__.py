"""Decoders of the Llama kind on generated kernels: their definition, tokenizers, sampling, serving.

A model is opened from a GGUF file by `kernelgen.models.open`; `kernelgen run` does the rest.
"""

from __future__ import annotations

from kernelgen.models.generation import Generation, perplexity
from kernelgen.models.hyperparameters import Hyperparameters
from kernelgen.models.llama import Decoder, Sequences, open
from kernelgen.models.ranks.group import Ranks
from kernelgen.models.ranks.mesh import connect
from kernelgen.models.ranks.plan import Plan
from kernelgen.models.sampling import Sampler
from kernelgen.models.serving import Request, Server
from kernelgen.models.tokenizer import Tokenizer

__all__ = [
    "Decoder", "Generation", "Hyperparameters", "Plan", "Ranks", "Request", "Sampler",
    "Sequences", "Server", "Tokenizer", "connect", "open", "perplexity",
]  # fmt: skip
