"""3x3 convolutions in fewer multiplications: F(2x2, 3x3) of Lavin and Gray, 2015 (arXiv:1509.09308, section 4.1).

Sixteen sums of each tile of 4x4 inputs, neighbours sharing two rows or columns, meet sixteen sums of the kernel's
entries and give 2x2 outputs: 16 multiplications where the definition takes 36. With the tiles of a batch one below the
other, these are sixteen matrix products. Only the rounding differs: by some 1e-6 of the largest result, in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Of a batch, as many images are gone through at a time as have so many bytes of sums.
_SUMS_OF_A_PART = 32 * 2**20


def takes(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether `convolution` takes them, their sides being even, and gains.

    It does where channels are many, so that sums cost less than products, and tiles, so that the kernel's sums do.
    """
    batch, height, width = x.shape[:3]
    inputs, outputs = kernel.shape[2:]
    wide = min(inputs, outputs) >= 64 and inputs * outputs >= 64 * 128
    return height % 2 == width % 2 == 0 and wide and batch * height * width >= 1024


@jax.custom_vjp
def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the convolution with stride 1 and zeros around, so that the size stays, in float32.

    Args:
        x: [batch, height, width, inputs], height and width even.
        kernel: [3, 3, inputs, outputs] float32.
    """
    return _forward(x, kernel)[0]


def _forward(x, kernel):
    factors = _each(_of_kernel(kernel), lax.optimization_barrier)

    def convolve(part: jax.Array) -> jax.Array:
        products = [
            [jnp.dot(a, b, preferred_element_type=jnp.float32) for a, b in zip(*rows, strict=True)]
            for rows in zip(_of_image(part), factors, strict=True)
        ]
        return _to_image(_each(products, lax.optimization_barrier), part.shape)

    found = lax.map(convolve, _parts(x, x.shape))
    return found.reshape(-1, *x.shape[1:3], kernel.shape[3])[: x.shape[0]], (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved

    def add(total, parts):
        """Adds the gradient of the kernel's sums."""
        of_part = [
            [jnp.dot(a.T, b, preferred_element_type=jnp.float32) for a, b in zip(*rows, strict=True)]
            for rows in zip(_of_image(parts[0]), _of_result(parts[1]), strict=True)
        ]
        return jax.tree.map(jnp.add, total, of_part), None

    nothing = [[jnp.zeros(kernel.shape[2:], jnp.float32)] * 4] * 4
    total, _ = lax.scan(add, nothing, (_parts(x, x.shape), _parts(gradient, x.shape)))
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return convolution(gradient, turned).astype(x.dtype), _to_kernel(total)


convolution.defvjp(_forward, _backward)


def _parts(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[batch, ..] -> [parts, images of a part, ..], filled up with zeros; how many, by the shape of the input."""
    batch, height, width, channels = shape
    sums = 4 * 4 * height * width * channels  # bytes of an image's: four times as many as it has entries
    count = -(-batch // max(1, _SUMS_OF_A_PART // sums))
    size = -(-batch // count)
    filled = jnp.pad(x, ((0, count * size - batch), (0, 0), (0, 0), (0, 0)))
    return filled.reshape(count, size, *x.shape[1:])


# The algorithm's matrices, each applied to both axes of a tile: B transposed, G, A transposed, and their transposes. A
# tile is a list of lists of arrays.


def _both(transform, tile):
    """Applies a transform to the columns of a tile, then to the rows."""
    columns = [transform(list(column)) for column in zip(*tile, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _each(tile, function):
    return [[function(x) for x in row] for row in tile]


def _rows(x):
    """[images, height, width, channels] -> a matrix, computed before it is multiplied."""
    return lax.optimization_barrier(x.reshape(-1, x.shape[-1]))


def _of_image(x):
    """[images, height, width, channels] -> sixteen of [tiles, channels]."""
    images, height, width, channels = x.shape
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)))

    def corner(i, j):  # entry (i, j) of every tile
        return lax.slice(padded, (0, i, j, 0), (images, i + height - 1, j + width - 1, channels), (1, 2, 2, 1))

    tile = [[corner(i, j) for j in range(4)] for i in range(4)]
    return _each(_both(lambda d: [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]], tile), _rows)


def _of_result(y):
    """[images, height, width, channels] -> sixteen of [tiles, channels]: what `_to_image` does, transposed."""
    tile = [[y[:, i::2, j::2] for j in range(2)] for i in range(2)]
    return _each(_both(lambda y: [y[0], y[0] + y[1], y[0] - y[1], -y[1]], tile), _rows)


def _to_image(tile, shape):
    """Sixteen of [tiles, channels] -> [images, height, width, channels]."""
    images, height, width, _ = shape
    found = _both(lambda m: [m[0] + m[1] + m[2], m[1] - m[2] - m[3]], tile)
    found = _each(found, lambda y: y.reshape(images, height // 2, width // 2, -1))
    return jnp.stack([jnp.stack(row, axis=3) for row in found], axis=2).reshape(images, height, width, -1)


def _of_kernel(kernel):
    """[3, 3, inputs, outputs] -> sixteen of [inputs, outputs]."""
    return _both(lambda g: [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]], list(map(list, kernel)))


def _to_kernel(tile):
    """Sixteen of [inputs, outputs] -> [3, 3, inputs, outputs]: what `_of_kernel` does, transposed."""
    found = _both(lambda u: [u[0] + (u[1] + u[2]) / 2, (u[1] - u[2]) / 2, (u[1] + u[2]) / 2 + u[3]], tile)
    return jnp.stack([jnp.stack(row) for row in found])
