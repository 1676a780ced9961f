"""How far the weights in two folders are from each other: the first *.safetensors of each, tensor by tensor.

python benchmarks/compare_weights.py outputs/a outputs/b
"""

import sys
from pathlib import Path

from safetensors.torch import load_file

first, second = (
    load_file(next(iter(sorted(Path(folder).glob("*.safetensors"))))) for folder in sys.argv[1:3]
)
assert first.keys() == second.keys(), "the folders hold different tensors"
distance = max((first[name].float() - second[name].float()).abs().max().item() for name in first)
size = max(tensor.float().abs().max().item() for tensor in first.values())
print(
    f"largest difference {distance:.3g}, of weights up to {size:.3g}"
    + (": equal" if distance == 0 else "")
)
