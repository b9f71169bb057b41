"""Runs GPU kernels on the CPU, and finds their bugs.

Kernel text runs as it is: CUDA with its inline PTX, OpenCL, Metal.  Each thread is a fiber, each
buffer ends at an unmapped page, and each launch is repeated with the threads in another order.
It needs a C++ compiler and no GPU, and knows nothing of the rest of kernelgen.
"""

from kernelgen.emulator.compiler import EmulatorError
from kernelgen.emulator.emulator import Emulator, Local, emulate
from kernelgen.emulator.report import Finding, Report

__all__ = ["Emulator", "EmulatorError", "Finding", "Local", "Report", "emulate"]
