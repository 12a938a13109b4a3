"""What a build that fails says of its cause."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import toolchain

COMMAND = (
    "FAILED: [code=1] csrc_torch_library.cpp.o\n"
    "c++ -MMD -MF csrc_torch_loss.cpp.o.d -O3 -std=c++17 -I../../csrc/include -march=x86-64-v3 "
    "-isystem /e/torch/include -isystem /e/pybind11/include -c ../../csrc/torch/library.cpp -o a.o\n"
)


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("c++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
        ("virtual memory exhausted: Cannot allocate memory", "MAX_JOBS=1"),
        ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", "MAX_JOBS=1"),
        ("/tmp/ccX.s: fatal error: error writing: No space left on device", "TMPDIR"),
        (
            "crt/host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 "
            "are not supported!",
            "-ccbin g++-13",
        ),
        (
            "g++: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler properties.",
            "put g++ on PATH",
        ),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_120'", "nvcc is too old"),
        ("nvcc fatal   : Value 'c++17' is not defined for option 'std'", "nvcc is too old"),
        ("device.cuh:11:10: fatal error: cuda_runtime.h: No such file or directory", "toolkit is incomplete"),
        ("/usr/bin/ld: cannot find -lcudart_static: No such file or directory", "toolkit is incomplete"),
        ("fatal error: Python.h: No such file or directory", "python3-dev"),
        ("fatal error: torch/csrc/stable/ops.h: No such file or directory", "install torch again"),
        ("fatal error: 'torch/csrc/stable/ops.h' file not found", "install torch again"),
        ("/usr/bin/ld: cannot find -ltorch_cpu: No such file or directory", "install torch again"),
        ("fatal error: dparallel/launch.h: No such file or directory", "complete copy"),
        ("ninja: error: 'a.cpp', needed by 'a.o', missing and no known rule to make it", "complete copy"),
        ("cc1plus: error: bad value ‘x86-64-v3’ for ‘-march=’ switch", "GCC 11"),
        ("error: unknown target CPU 'x86-64-v4'", "GCC 11"),
        ("g++: error: unrecognized command line option ‘-std=c++17’; did you mean ‘-std=c++1z’?", "GCC 11"),
        ("xcrun: error: invalid active developer path", "xcode-select"),
        ("c++: fatal error: cannot execute ‘cc1plus’: execvp: No such file or directory", "build-essential"),
        ("error: expected ‘;’ before ‘}’ token", "first error above"),
    ],
)
def test_advice_speaks_of_the_cause(said, remedy):
    assert remedy in toolchain.advice(COMMAND + said)
    assert "DPARALLEL_CUDA=0" in toolchain.advice("FAILED: [code=2] csrc_cuda_unmask.cu.o\nerror: x")
