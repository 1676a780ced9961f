"""Print the largest difference between the weights in two folders, which hold the same tensors.

    python benchmarks/compare_weights.py outputs/a outputs/b

Compares the first *.safetensors file of each folder, by name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safetensors.torch import load_file


def main(first_folder: Path, second_folder: Path) -> None:
    """Compare and print. End with an error if the folders do not hold the same tensors."""
    first = load_file(min(first_folder.glob("*.safetensors")))
    second = load_file(min(second_folder.glob("*.safetensors")))
    if first.keys() != second.keys():
        sys.exit(f"{first_folder} and {second_folder}: the files hold different tensors")
    differences = [first[name].float() - second[name].float() for name in first]
    largest_difference = max(difference.abs().max().item() for difference in differences)
    largest_weight = max(weight.float().abs().max().item() for weight in first.values())
    message = f"largest difference {largest_difference:.3g}, of weights up to {largest_weight:.3g}"
    if largest_difference == 0:
        message += ": equal"
    print(message)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="folder of a run")
    parser.add_argument("second", type=Path, help="folder of another run")
    args = parser.parse_args()
    main(args.first, args.second)
