"""Compile the simulated device: ``python -m tests.device.build OUTPUT.so``."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("simulated_device.cpp")


def build(output: Path) -> None:
    """Compile ``simulated_device.cpp`` with the C++ compiler (``CXX``, else g++).

    Args:
        output: File of the shared library, replaced.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    api = include / "torch" / "csrc" / "api" / "include"
    folders = [include, api, sysconfig.get_paths()["include"]]
    abi = int(torch.compiled_with_cxx11_abi())
    command = [
        *(os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-O1", "-std=c++20"),
        *("-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *(f"-isystem{folder}" for folder in folders),
        *(str(SOURCE), "-o", str(output)),
        *(f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
