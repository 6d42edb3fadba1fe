"""MomentumStats: beta_t of every tensor -> what a logger shows. No framework, no device."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

# The first pattern found says a parameter's kind. It is searched in the name without the last part (``weight``).
_KINDS = (
    ("norm", r"norm|(^|\.)ln(_|\d|$)|(^|\.)bn\d*$"),
    ("attn.qkv", r"(^|\.)([qkv]|qkv|query|key|value|query_key_value|c_attn|in_proj|w[qkv]|wqkv|[qkv]_proj|qkv_proj)$"),
    ("attn.out", r"(attn|attention)[^.]*(\.output)?\.(o|out|o_proj|out_proj|output_proj|c_proj|proj|wo|dense)$"),
    ("mlp", r"mlp|ffn|feed_?forward|(gate|up|down)_proj$|(^|\.)(fc\d*|linear\d+|w[123]|intermediate|experts?)(\.|$)"),
    ("mlp", r"\d\.output\.dense$"),
    ("embed", r"embed|(^|\.)wte$|(^|\.)wpe$"),
    ("head", r"(^|\.)(lm_head|head|classifier|output|score)$"),
)
_KIND_PATTERNS = [(kind, re.compile(pattern)) for kind, pattern in _KINDS]
# What adapters (PEFT, litgpt, torchtune) and torch's parametrizations put into names, before and after what they adapt.
# PEFT has some forty methods: each begins its parameters with a word and "_", and calls its first adapter "default".
_INSIDE = re.compile(r"(?<=\.)(?:base_layer|original_module)\.")
_BELOW = re.compile(r"\.(?:lora_\w+|modules_to_save|token_adapter|parametrizations|\w+_\w+(?=\.default\b))(?:\.|$)")
_NUMBERED = re.compile(r"(?:.*?\.)??\d+(?=\.)")


def kind_of(name: str) -> str:
    """Layer group of a parameter, or what its adapter adapts: norm, attn.qkv, attn.out, mlp, embed, head, or other."""
    module = _module_of(name).lower()
    if "in_proj_" in name:  # torch.nn.MultiheadAttention keeps it in the attention module itself
        return "attn.qkv"
    return next((kind for kind, pattern in _KIND_PATTERNS if pattern.search(module)), "other")


def _module_of(name: str) -> str:
    """The module that has the parameter, or that an adapter with the parameter adapts."""
    name = _INSIDE.sub("", name)
    below = _BELOW.search(name)
    return name[: below.start()] if below else name.rpartition(".")[0] or name


def layers_of(names: Sequence[str]) -> list[str]:
    """Layer of each parameter: the module path up to its first number, else the module.

    Only the last words are kept where that says enough: ``model.layers.3.mlp.up_proj.weight`` -> ``layers.3``,
    ``lm_head.weight`` -> ``lm_head``, but ``encoder.layers.0`` where there is a ``decoder.layers.0``.
    """
    paths = []
    for name in names:
        module = _module_of(name)
        numbered = _NUMBERED.match(f"{module}.")
        paths.append(numbered.group(0) if numbered else module)
    short = {path: _last_words(path) for path in paths}
    unique = len(set(short.values())) == len(short)
    return [short[path] if unique else path for path in paths]


def _last_words(path: str) -> str:
    words = path.split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])


class MomentumStats:
    """Turns one vector of beta_t into scalars.

    Args:
        names: of the tensors, in the order of the vector.
        caps: the cap of beta_t of each tensor.
        prefix: of all tags; the second optimizer's is ``am-1``.
    """

    def __init__(self, names: Sequence[str], caps: Sequence[float], prefix: str = "am") -> None:
        self.names = list(names)
        self.caps = torch.tensor(list(caps), dtype=torch.float64, device="cpu")
        self.prefix = prefix
        self._kinds = _index([kind_of(name) for name in names])
        self._layers = _index(layers_of(names))

    def scalars(self, betas: Tensor) -> dict[str, float]:
        """``<prefix>/beta/mean|min|max``, ``/beta/<layer group>``, ``/clamp/at_max|at_zero`` (shares of the tensors).

        Args:
            betas: ``[tensors]`` on the CPU; nan for tensors that have never stepped, which are left out.
        """
        betas = betas.to(torch.float64)
        seen = ~betas.isnan()
        if not bool(seen.any()):
            return {}
        known = betas[seen]
        at_max = known >= self.caps[seen] - 1e-6  # the state keeps float32
        scalars = {
            "beta/mean": known.mean(),
            "beta/min": known.min(),
            "beta/max": known.max(),
            "clamp/at_max": at_max.double().mean(),
            "clamp/at_zero": (known <= 0).double().mean(),
        }
        means = {f"{self.prefix}/{tag}": float(value) for tag, value in scalars.items()}
        return means | _means(betas, self._kinds, f"{self.prefix}/beta")

    def layers(self, betas: Tensor) -> dict[str, float]:
        """``<prefix>/beta/layer/<layer>``: the mean of each layer's tensors."""
        return _means(betas.to(torch.float64), self._layers, f"{self.prefix}/beta/layer")

    def custom_scalars(self) -> dict[str, dict[str, list[object]]]:
        """A TensorBoard Custom Scalars layout that overlays the layers, the layer groups, and the clamps."""
        p = re.escape(self.prefix)
        groups = "|".join(re.escape(kind) for kind in self._kinds)
        charts: dict[str, list[object]] = {
            "beta_t by layer": ["Multiline", [f"^{p}/beta/layer/.*"]],
            "beta_t by layer group": ["Multiline", [f"^{p}/beta/(?:{groups})$"]],
            "beta_t of all tensors": ["Multiline", [f"^{p}/beta/(?:mean|min|max)$"]],
            "share of tensors at a clamp": ["Multiline", [f"^{p}/clamp/.*"]],
        }
        return {f"adaptive momentum ({self.prefix})": charts}


def _index(labels: Sequence[str]) -> dict[str, list[int]]:
    """label -> positions, in order of first appearance."""
    result: dict[str, list[int]] = {}
    for position, label in enumerate(labels):
        result.setdefault(label, []).append(position)
    return result


def _means(betas: Tensor, index: dict[str, list[int]], prefix: str) -> dict[str, float]:
    means = {f"{prefix}/{label}": float(betas[rows].nanmean()) for label, rows in index.items()}
    return {tag: mean for tag, mean in means.items() if mean == mean}  # not nan
