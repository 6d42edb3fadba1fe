"""Every tensor that the package makes names its device, because the default device is the user's and may be any."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.package.tree import PACKAGE, module_name, sources

FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    "Tensor", "FloatTensor", "DoubleTensor", "LongTensor", "Generator",
}  # fmt: skip
BY_PLACE = {"Generator"}  # its device may be the first argument


def _homeless(path: Path) -> list[int]:
    """Return the lines of calls of torch's factories without ``device=``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, node.func.value
        if not (isinstance(owner, ast.Name) and owner.id == "torch" and name in FACTORIES):
            continue
        if not (any(k.arg == "device" for k in node.keywords) or (name in BY_PLACE and node.args)):
            found.append(node.lineno)
    return found


# A recipe is a program of its own, which sets no default device.
LIBRARY = [path for path in sources(PACKAGE) if not module_name(path).startswith("am_lightning.pretrain")]


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_every_new_tensor_has_a_device(path: Path) -> None:
    lines = _homeless(path)
    assert not lines, f"{path.name}: torch's factories without device= in lines {lines}"


def test_it_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "made.py"
    source.write_text("a = torch.zeros(3)\nb = torch.zeros(3, device=x.device)\nc = torch.Generator()\n")
    assert _homeless(source) == [1, 3]
