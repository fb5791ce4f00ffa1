"""The multiplications and additions of a function's matrix products and convolutions, from shapes alone.

All else (normalisation, activations, the optimiser) is linear in what the products make, a few per cent of them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from jaxtl.models import kernels


def count(function: Callable, *args: Any) -> int:
    """Returns the floating-point operations of a function's matrix products and convolutions; computes nothing.

    A loop whose number of turns is not known counts as one turn, of a choice the dearest branch.

    Args:
        function: traceable.
        args: its arguments, or abstract ones like them.
    """
    with kernels.plain():  # the same count on every backend
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    # A gradient that nobody asked for is in the program as it was traced, and in none that is compiled.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_OWN.get(equation.primitive.name, _inner)(equation) for equation in jaxpr.eqns)


def _product(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    """Without the products with padding, and with the zeros that a dilated operand is filled up with."""
    given, numbers = equation.params, equation.params["dimension_numbers"]
    image, kernel, result = (variable.aval.shape for variable in (*equation.invars, *equation.outvars))
    pairs = 1  # of a position of the result and one of the kernel that meet a value of the image
    for axis, (low, _) in enumerate(given["padding"]):
        outputs = np.arange(result[numbers.out_spec[2 + axis]])[:, None] * given["window_strides"][axis]
        steps = np.arange(kernel[numbers.rhs_spec[2 + axis]]) * given["rhs_dilation"][axis]
        position, apart = outputs + steps - low, given["lhs_dilation"][axis]
        length = (image[numbers.lhs_spec[2 + axis]] - 1) * apart + 1
        pairs *= int(np.sum((position >= 0) & (position < length) & (position % apart == 0)))
    batch, features = result[numbers.out_spec[0]], result[numbers.out_spec[1]]
    return 2 * batch * features * kernel[numbers.rhs_spec[1]] * pairs


def _inner(equation: core.JaxprEqn) -> int:
    """Returns the operations of the functions that an operation calls."""
    counts = [_count(inner) for inner in core.jaxprs_in_params(equation.params)]
    return max(counts) if equation.primitive.name == "cond" else sum(counts)


_OWN: dict[str, Callable[[core.JaxprEqn], int]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "scan": lambda equation: equation.params["length"] * _inner(equation),
}
