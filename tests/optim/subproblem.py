"""The two-plane proximal subproblem, solved by brute force (numpy, small dimension).

At x with gradient g, memory d, gap Delta, positive diagonal metric P, decay mu and memory regularisation lambda:

    min_{d'}  max{ <g, u>,  Delta + <d, u> } + 1/(2 eta) |u|_P^2 + mu/2 |x + u|_P^2 + lambda s/2 |d' - d|^2
    where  u = -s (d'/P + mu x)  is the proximal step that the new memory d' makes,  s = eta / (1 + mu eta).

With mu = 0 this is exactly the model of the method (s = eta). With mu > 0 the step is the implicit (proximal) form of
decoupled decay, which the optimizer replaces by its first-order form x' = (1 - mu eta) x - eta d'/P. The memory term is
scaled by s like the step, which makes d' independent of mu in the published update.

The max is written as a maximum over b in [0, cap] of the blend of both planes; cap = 1 is the max itself, a smaller cap
limits the weight of the memory plane. Nothing below uses the closed form of beta or of d'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass
class Subproblem:
    g: Array
    d: Array
    x: Array
    p: Array
    eta: float
    mu: float
    lam: float
    delta: float

    def move(self, memory: Array) -> Array:
        return -self.eta / (1.0 + self.mu * self.eta) * (memory / self.p + self.mu * self.x)

    def planes(self, memory: Array) -> tuple[float, float]:
        u = self.move(memory)
        return float(self.g @ u), self.delta + float(self.d @ u)

    def regular(self, memory: Array) -> float:
        u, s = self.move(memory), self.eta / (1.0 + self.mu * self.eta)
        near = float(u @ (self.p * u)) / (2 * self.eta)
        decay = 0.5 * self.mu * float((self.x + u) @ (self.p * (self.x + u)))
        return near + decay + 0.5 * self.lam * s * float((memory - self.d) @ (memory - self.d))

    def blend(self, b: float, memory: Array) -> float:
        gradient_plane, memory_plane = self.planes(memory)
        return b * memory_plane + (1.0 - b) * gradient_plane + self.regular(memory)

    def inner(self, b: float) -> Array:
        """Return the minimiser d' for a fixed b. The objective is a strictly convex quadratic, found by differences."""
        n = self.g.size
        unit = np.eye(n) * np.sqrt(self.p / self.eta)[:, None]  # differences are exact; this keeps them well scaled
        f0 = self.blend(b, np.zeros(n))
        plus = np.array([self.blend(b, e) for e in unit])
        minus = np.array([self.blend(b, -e) for e in unit])
        both = np.array([[self.blend(b, e + f) for f in unit] for e in unit])
        hessian = both - plus[:, None] - plus[None, :] + f0
        return unit @ np.linalg.solve(hessian, -(plus - minus) / 2)

    def value(self, b: float) -> float:
        """Return the dual function, which is concave in b."""
        return self.blend(b, self.inner(b))

    def primal(self, memory: Array) -> float:
        return max(self.planes(memory)) + self.regular(memory)

    def golden(self, cap: float) -> float:
        """Return the argmax of ``value`` on [0, cap] by golden section, right to about 1e-7: a maximum is flat."""
        ratio = (np.sqrt(5.0) - 1.0) / 2.0
        low, high = 0.0, cap
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        f_left, f_right = self.value(left), self.value(right)
        while high - low > 1e-7:
            if f_left < f_right:
                low, left, f_left = left, right, f_right
                right = low + ratio * (high - low)
                f_right = self.value(right)
            else:
                high, right, f_right = right, left, f_left
                left = high - ratio * (high - low)
                f_left = self.value(left)
        return 0.5 * (low + high)

    def vertex(self, cap: float) -> float:
        """Return the same argmax from three values of ``value``, which is a parabola: exact to rounding."""
        f0, f1, f2 = self.value(0.0), self.value(0.5), self.value(1.0)
        curve = 2.0 * (f0 - 2.0 * f1 + f2)
        slope = f2 - f0 - curve
        return float(np.clip(-slope / (2.0 * curve), 0.0, cap))
