"""Time fused_experts beside vLLM's and transformers' experts at the shapes of published layers; needs a GPU."""

import argparse
import sys

from numba_moe.bench import layers


def main() -> int:
    """Return 1 if ours took longer on the device anywhere."""
    parser = argparse.ArgumentParser(description=__doc__)
    layers.add_arguments(parser)
    return layers.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
