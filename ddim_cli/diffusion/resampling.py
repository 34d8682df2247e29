"""RePaint's way along the grid (Lugmayr et al., arXiv:2201.09865, section 4.2): down it, with jumps back up."""

from __future__ import annotations

# RePaint's own: shorter jumps leave the two parts of a picture apart, longer ones lose what was found.
JUMP = 10


def stretches(count: int, resample: int, jump: int = JUMP) -> list[range]:
    """The steps of a grid of ``count`` steps that run between two jumps, in their order.

    After each ``jump`` steps, counted from the grid's end, the state goes back up ``jump`` steps, ``resample`` - 1
    times, so that each of these steps runs ``resample`` times in all. With ``resample`` 1, and on a grid of no more
    than ``jump`` steps, there is one stretch: the whole grid.
    """
    left = dict.fromkeys(range(0, count - jump, jump), resample - 1)
    found, start, remaining = [], 0, count
    while remaining > 0:
        remaining -= 1
        if left.get(remaining, 0) > 0:
            left[remaining] -= 1
            found.append(range(start, count - remaining))
            remaining += jump
            start = count - remaining
    return [*found, range(start, count)]
