"""Two scaling laws: the loss as a function of parameters N and tokens D.

Chinchilla (arXiv:2203.15556, equation 2):  L = E + A / N^alpha + B / D^beta
Kaplan     (arXiv:2001.08361, equation 1.5): L = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D

Both are fitted in the logarithm of the loss. Legend: R runs, K parameters of the law.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product
from typing import ClassVar

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.optional import require

FLOPS_PER_PARAM_AND_TOKEN = 6.0  # forward 2, backward 4 (arXiv:2001.08361, section 2.1)


class Law(ABC):
    """A scaling law; `theta` (K,) are its numbers in the form in which they are fitted (sizes as logarithms)."""

    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def log_loss(self, theta: Array, params: Array, tokens: Array) -> Array:
        """Natural logarithm of the loss (R,)."""

    @abstractmethod
    def starts(self) -> Sequence[Array]:
        """Where a fit begins; it is not convex."""

    @abstractmethod
    def values(self, theta: Array) -> dict[str, float]:
        """The numbers of the law by their published names."""

    def loss(self, theta: Array, params: float, tokens: float) -> float:
        """The loss of one run."""
        return float(np.exp(self.log_loss(theta, np.array([params]), np.array([tokens]))[0]))

    def optimum(self, theta: Array, flops: float) -> tuple[float, float]:
        """Parameters and tokens with the least loss for `flops` = 6 N D."""
        pairs = flops / FLOPS_PER_PARAM_AND_TOKEN
        found = require("scipy.optimize").minimize_scalar(
            lambda log_n: float(self.log_loss(theta, np.exp([log_n]), np.array([pairs / np.exp(log_n)]))[0]),
            bounds=(0.0, float(np.log(pairs))), method="bounded", options={"xatol": 1e-9},
        )
        params = float(np.exp(found.x))
        return params, pairs / params


class Chinchilla(Law):
    """`theta` = (log E, log A, log B, alpha, beta)."""

    names = ("E", "A", "B", "alpha", "beta")

    def log_loss(self, theta: Array, params: Array, tokens: Array) -> Array:
        """See `Law.log_loss`; a log-sum-exp of the three terms (arXiv:2203.15556, equation 10)."""
        log_e, log_a, log_b, alpha, beta = theta
        terms_3R = np.stack([log_a - alpha * np.log(params), log_b - beta * np.log(tokens),
                             np.full(len(params), log_e)])
        return np.asarray(np.logaddexp.reduce(terms_3R, axis=0))

    def starts(self) -> Sequence[Array]:
        """The grid of arXiv:2203.15556, appendix D.3."""
        exponents, sizes = (0.25, 0.5, 1.0, 1.5), (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)
        return [np.array(point) for point in product((-6.0, -3.0, -1.0, 0.0, 1.0), sizes, sizes, exponents, exponents)]

    def values(self, theta: Array) -> dict[str, float]:
        """E, A, B, alpha and beta."""
        numbers = [*np.exp(np.clip(theta[:3], -700, 700)), *theta[3:]]
        return {name: float(number) for name, number in zip(self.names, numbers, strict=True)}

    def optimum(self, theta: Array, flops: float) -> tuple[float, float]:
        """In closed form (arXiv:2203.15556, equation 4)."""
        _, log_a, log_b, alpha, beta = theta
        both = alpha + beta
        log_g = (np.log(alpha / beta) + log_a - log_b) / both
        log_pairs = np.log(flops / FLOPS_PER_PARAM_AND_TOKEN)
        return float(np.exp(log_g + log_pairs * beta / both)), float(np.exp(-log_g + log_pairs * alpha / both))


class Kaplan(Law):
    """`theta` = (log Nc, log Dc, alpha_N, alpha_D)."""

    names = ("Nc", "Dc", "alpha_N", "alpha_D")

    def log_loss(self, theta: Array, params: Array, tokens: Array) -> Array:
        """See `Law.log_loss`."""
        log_nc, log_dc, alpha_n, alpha_d = theta
        size_R = alpha_n / alpha_d * (log_nc - np.log(params))
        return np.asarray(alpha_d * np.logaddexp(size_R, log_dc - np.log(tokens)))

    def starts(self) -> Sequence[Array]:
        """A grid around the published numbers."""
        sizes, exponents = (5.0, 10.0, 20.0, 30.0, 40.0), (0.05, 0.1, 0.3, 0.6)
        return [np.array(point) for point in product(sizes, sizes, exponents, exponents)]

    def values(self, theta: Array) -> dict[str, float]:
        """Nc, Dc, alpha_N and alpha_D."""
        numbers = [*np.exp(np.clip(theta[:2], -700, 700)), *theta[2:]]
        return {name: float(number) for name, number in zip(self.names, numbers, strict=True)}


LAWS: dict[str, Law] = {"chinchilla": Chinchilla(), "kaplan": Kaplan()}
