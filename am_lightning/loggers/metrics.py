"""Turn beta_t of every tensor over an interval of steps into the scalars of a logger. Runs on the CPU."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from am_lightning.optim.intervals import Interval

# The first pattern that matches gives the kind. It is searched in the name without its last part (``weight``).
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
# Adapters (PEFT, litgpt, torchtune) and torch's parametrizations insert these parts into names, before or after the
# adapted module. In PEFT's forty or so methods, parameter names start with a word and "_", and the first adapter is
# called "default".
_INSIDE = re.compile(r"(?<=\.)(?:base_layer|original_module)\.")
_BELOW = re.compile(r"\.(?:lora_\w+|modules_to_save|token_adapter|parametrizations|\w+_\w+(?=\.default\b))(?:\.|$)")
_NUMBERED = re.compile(r"(?:.*?\.)??\d+(?=\.)")


def kind_of(name: str) -> str:
    """Return a parameter's layer group: norm, attn.qkv, attn.out, mlp, embed, head or other.

    The group of an adapter's parameter is the group of the module that it adapts.
    """
    module = _module_of(name).lower()
    if "in_proj_" in name:  # torch.nn.MultiheadAttention keeps it in the attention module itself
        return "attn.qkv"
    return next((kind for kind, pattern in _KIND_PATTERNS if pattern.search(module)), "other")


def _module_of(name: str) -> str:
    """Return the path of the module that owns the parameter, or of the module that the parameter's adapter adapts."""
    name = _INSIDE.sub("", name)
    below = _BELOW.search(name)
    return name[: below.start()] if below else name.rpartition(".")[0] or name


def layer_paths(names: Sequence[str]) -> list[str]:
    """Return the layer of each parameter: the module path up to its first number, or the whole path without one."""
    paths = []
    for name in names:
        module = _module_of(name)
        numbered = _NUMBERED.match(f"{module}.")
        paths.append(numbered.group(0) if numbered else module)
    return paths


def shortened(paths: Sequence[str]) -> list[str]:
    """Shorten paths to their last parts: ``model.layers.3`` becomes ``layers.3``.

    All paths stay whole if two of them would become equal, such as ``encoder.layers.0`` and ``decoder.layers.0``.
    """
    short = {path: _last_words(path) for path in paths}
    unique = len(set(short.values())) == len(short)
    return [short[path] if unique else path for path in paths]


def _last_words(path: str) -> str:
    words = path.split(".")
    return ".".join(words[-2:] if words[-1].isdigit() else words[-1:])


def in_a_sentence(layer: str) -> str:
    """Return ``layers.3`` unchanged, and ``2`` of an ``nn.Sequential`` as ``layer 2``, to tell it from a value."""
    return f"layer {layer}" if layer.isdigit() else layer


class MomentumStats:
    """Turn an ``Interval`` of beta_t into scalars.

    Args:
        names: names of the tensors, in the order of the interval.
        caps: cap of beta_t of each tensor.
        prefix: prefix of all tags. Default: "am"; the second optimizer has "am-1".

    Attributes:
        cap: the largest cap.
        layer_paths: paths of the layers, in the order of their first tensors. Tags use the ``shortened`` paths.
    """

    def __init__(self, names: Sequence[str], caps: Sequence[float], prefix: str = "am") -> None:
        self.names, self.prefix = list(names), prefix
        self.cap = max(caps, default=0.0)
        paths = layer_paths(names)
        self.layer_paths = list(dict.fromkeys(paths))
        self._kinds, self._layers = _Labels([kind_of(name) for name in names]), _Labels(shortened(paths))

    def scalars(self, interval: Interval) -> dict[str, float]:
        """Return the scalars of all tensors and of each layer group by tag.

        ``<prefix>/beta/mean|min|max`` is over all tensors and steps, ``/beta/cap`` is the largest cap,
        ``/beta/effective_steps`` is 1 / (1 - mean), and ``/clamp/at_max|at_zero`` are shares of the tensors' steps.
        ``/beta/<layer group>`` is the mean of a layer group, with ``/min`` and ``/max``.

        Args:
            interval: interval of beta_t, whose fields have the shape ``[tensors]`` and are on the CPU. Tensors without
                a step are left out. If no tensor has stepped, the result is empty.
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
        """Return ``<prefix>/beta/layer/<layer>``, the mean over the layer's tensors and steps, and its ``/min``."""
        found = self._layers.scalars(interval, highest=False)
        return {f"{self.prefix}/beta/layer/{tag}": value for tag, value in found.items()}

    def by_layer(self, interval: Interval) -> Interval:
        """Return the interval by layer, whose fields have the shape ``[layers]``."""
        return self._layers.sums(interval)

    def custom_scalars(self, before: str = "") -> dict[str, dict[str, list[object]]]:
        """Return a TensorBoard Custom Scalars layout.

        Charts show the mean between the lowest and the highest beta_t, for all tensors and for each layer group, the
        shares at the clamps, and the effective steps.

        Args:
            before: prefix that the framework adds to all tags. Default: "".
        """
        p = f"{before}{self.prefix}"
        charts: dict[str, list[object]] = {
            "beta_t of all tensors": ["Margin", [f"{p}/beta/{end}" for end in ("mean", "min", "max")]]
        }
        for kind in self._kinds.names:
            charts[f"beta_t of {kind}"] = ["Margin", [f"{p}/beta/{kind}{end}" for end in ("", "/min", "/max")]]
        charts["share of tensors at a clamp"] = ["Multiline", [f"^{re.escape(p)}/clamp/.*"]]
        reach = f"^{re.escape(p)}/beta/(effective_steps|floor)$"  # the floor at 0 starts the axis there
        charts["steps that the momentum reaches back"] = ["Multiline", [reach]]
        return {f"adaptive momentum ({self.prefix})": charts}


class _Labels:
    """Group tensors that have the same label.

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
        """Reduce an interval whose fields are ``[tensors]`` to one whose fields are ``[labels]``."""
        count = len(self.names)
        total, at_max, at_zero, steps = (of.new_zeros(count).index_add(0, self._of, of) for of in interval[:4])
        lowest = total.new_full((count,), float("inf")).scatter_reduce(0, self._of, interval.lowest, "amin")
        highest = total.new_full((count,), float("-inf")).scatter_reduce(0, self._of, interval.highest, "amax")
        return Interval(total, at_max, at_zero, steps, lowest, highest)

    def scalars(self, interval: Interval, *, highest: bool) -> dict[str, float]:
        """Return ``<label>``, the mean, ``<label>/min`` and, if ``highest``, ``<label>/max``.

        Labels without a step are left out.
        """
        sums, scalars = self.sums(interval), {}
        for place, label in enumerate(self.names):
            if sums.steps[place] > 0:
                scalars[label] = float(sums.total[place] / sums.steps[place])
                scalars[f"{label}/min"] = float(sums.lowest[place])
                if highest:
                    scalars[f"{label}/max"] = float(sums.highest[place])
        return scalars
