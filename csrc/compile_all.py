"""Compile every GPU kernel that can be asked for: to see that a compiler takes them, or to fill the cache before use.

No GPU is needed.

examples:
  python -m attention_predictor.csrc.compile_all --capability 9.0    # what GPUs of that kind will look for
  python -m attention_predictor.csrc.compile_all --compiler nvcc
"""

from __future__ import annotations

import argparse
import logging
import sys

from attention_predictor.csrc import compiler
from attention_predictor.csrc.ops import every_kernel
from attention_predictor.errors import BuildError

CAPABILITIES = ["8.0", "8.9", "9.0", "10.0"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", choices=["nvrtc", "nvcc"], default="nvrtc", help="default %(default)s")
    parser.add_argument("--capability", nargs="+", default=CAPABILITIES, help="default " + " ".join(CAPABILITIES))
    args = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG, format="%(message)s")
    try:
        chosen = compiler.Nvcc() if args.compiler == "nvcc" else compiler.Nvrtc()
        for capability in args.capability:
            major, minor = map(int, capability.split("."))
            print(f"compute capability {capability}, {chosen.version.splitlines()[-1]}", flush=True)
            compiler.compiled(every_kernel(), (major, minor), chosen)
    except BuildError as error:
        print(f"compile_all: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
