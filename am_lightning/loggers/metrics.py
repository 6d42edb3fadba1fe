"""MomentumStats: beta_t of every tensor over an interval of steps -> what a logger shows. No framework, no device."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from am_lightning.optim.intervals import Interval

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


def layer_paths(names: Sequence[str]) -> list[str]:
    """Layer of each parameter: the module path up to its first number, else the module."""
    paths = []
    for name in names:
        module = _module_of(name)
        numbered = _NUMBERED.match(f"{module}.")
        paths.append(numbered.group(0) if numbered else module)
    return paths


def shortened(paths: Sequence[str]) -> list[str]:
    """Layers by their last words, where those say enough: ``model.layers.3`` -> ``layers.3``, ``lm_head``, but
    ``encoder.layers.0`` where there is a ``decoder.layers.0``."""
    short = {path: _last_words(path) for path in paths}
    unique = len(set(short.values())) == len(short)
    return [short[path] if unique else path for path in paths]


def _last_words(path: str) -> str:
    words = path.split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])


def in_a_sentence(layer: str) -> str:
    """``layers.3`` as it is; the ``2`` of an ``nn.Sequential`` as ``layer 2``, or it reads as a value."""
    return f"layer {layer}" if layer.isdigit() else layer


class MomentumStats:
    """Turns an ``Interval`` of beta_t into scalars.

    Args:
        names: of the tensors, in the order of the interval.
        caps: the cap of beta_t of each tensor.
        prefix: of all tags; the second optimizer's is ``am-1``.

    Attributes:
        cap: the largest.
        layer_paths: the layers, in the order of their first tensors. Tags have them ``shortened``.
    """

    def __init__(self, names: Sequence[str], caps: Sequence[float], prefix: str = "am") -> None:
        self.names, self.prefix = list(names), prefix
        self.cap = max(caps, default=0.0)
        paths = layer_paths(names)
        self.layer_paths = list(dict.fromkeys(paths))
        self._kinds, self._layers = _Labels([kind_of(name) for name in names]), _Labels(shortened(paths))

    def scalars(self, interval: Interval) -> dict[str, float]:
        """``<prefix>/beta/mean|min|max``, over all tensors and steps, ``/beta/cap``, the largest, ``/effective_steps``,
        1 / (1 - mean), ``/clamp/at_max|at_zero``, shares of the tensors' steps, and of each layer group
        ``/beta/<layer group>``, its mean, with ``/min`` and ``/max``.

        Args:
            interval: ``[tensors]`` each, on the CPU. Tensors without a step in it are left out; without any: no tags.
        """
        total, at_max, at_zero, steps = (float(column.sum()) for column in interval[:4])
        if not steps:
            return {}
        mean = total / steps
        scalars = {
            "beta/mean": mean,
            "beta/min": float(interval.lowest.min()),
            "beta/max": float(interval.highest.max()),
            "beta/cap": self.cap,
            "beta/effective_steps": 1 / (1 - mean),
            "clamp/at_max": at_max / steps,
            "clamp/at_zero": at_zero / steps,
        }
        groups = {f"beta/{tag}": value for tag, value in self._kinds.scalars(interval, highest=True).items()}
        return {f"{self.prefix}/{tag}": value for tag, value in (scalars | groups).items()}

    def layers(self, interval: Interval) -> dict[str, float]:
        """``<prefix>/beta/layer/<layer>``: the mean over each layer's tensors and steps; with ``/min`` the lowest."""
        found = self._layers.scalars(interval, highest=False)
        return {f"{self.prefix}/beta/layer/{tag}": value for tag, value in found.items()}

    def by_layer(self, interval: Interval) -> Interval:
        """``[layers]`` each."""
        return self._layers.sums(interval)

    def custom_scalars(self, before: str = "") -> dict[str, dict[str, list[object]]]:
        """A TensorBoard Custom Scalars layout: the mean between the lowest and the highest, of all tensors and of each
        layer group, and the shares at the clamps.

        Args:
            before: what a framework puts before the tags.
        """
        p = f"{before}{self.prefix}"
        charts: dict[str, list[object]] = {
            "beta_t of all tensors": ["Margin", [f"{p}/beta/{end}" for end in ("mean", "min", "max")]]
        }
        for kind in self._kinds.names:
            charts[f"beta_t of {kind}"] = ["Margin", [f"{p}/beta/{kind}{end}" for end in ("", "/min", "/max")]]
        charts["share of tensors at a clamp"] = ["Multiline", [f"^{re.escape(p)}/clamp/.*"]]
        reach = f"^{re.escape(p)}/beta/(effective_steps|floor)$"  # from 0
        charts["steps that the momentum reaches back"] = ["Multiline", [reach]]
        return {f"adaptive momentum ({self.prefix})": charts}


class _Labels:
    """Tensors with the same label go together.

    Attributes:
        names: the labels, in the order of their first appearance.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        place: dict[str, int] = {}
        self._of = torch.tensor(
            [place.setdefault(label, len(place)) for label in labels], dtype=torch.int64, device="cpu"
        )
        self.names = list(place)

    def sums(self, interval: Interval) -> Interval:
        """``[tensors]`` each -> ``[labels]`` each."""
        count = len(self.names)
        total, at_max, at_zero, steps = (of.new_zeros(count).index_add(0, self._of, of) for of in interval[:4])
        lowest = total.new_full((count,), float("inf")).scatter_reduce(0, self._of, interval.lowest, "amin")
        highest = total.new_full((count,), float("-inf")).scatter_reduce(0, self._of, interval.highest, "amax")
        return Interval(total, at_max, at_zero, steps, lowest, highest)

    def scalars(self, interval: Interval, *, highest: bool) -> dict[str, float]:
        """Label -> its mean, ``<label>/min``, ``<label>/max``; labels without a step are left out."""
        sums, scalars = self.sums(interval), {}
        for place, label in enumerate(self.names):
            if sums.steps[place] > 0:
                scalars[label] = float(sums.total[place] / sums.steps[place])
                scalars[f"{label}/min"] = float(sums.lowest[place])
                if highest:
                    scalars[f"{label}/max"] = float(sums.highest[place])
        return scalars
