"""Linear RGB of other primaries in that of BT.709, whose primaries sRGB has."""

import numpy as np

from fantasy_jax.typing import Float, Float32

BT709, BT2020, P3 = 1, 9, 12
"""Numbers of ITU-T H.273."""
ADOBE = -1
"""Adobe RGB (1998) has no number."""
PRIMARIES = {
    BT709: ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06)),
    BT2020: ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),
    P3: ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    ADOBE: ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}
"""Chromaticities of red, green and blue; white is D65."""
_D65 = (0.3127, 0.3290)


def to_bt709(primaries: int) -> Float32[np.ndarray, "3 3"]:
    """The matrix from linear RGB of these primaries to that of BT.709; that of BT.2020 is ITU-R BT.2087's."""
    matrix = np.linalg.solve(_to_xyz(PRIMARIES[BT709]), _to_xyz(PRIMARIES[primaries]))
    return matrix.astype(np.float32)


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> Float[np.ndarray, "3 3"]:
    """The matrix from linear RGB to CIE XYZ."""
    white, *columns = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in (_D65, *primaries))
    matrix = np.stack(columns, axis=1)
    return matrix * np.linalg.solve(matrix, white)
