"""Which steps are not taken: those whose loss or gradient is not finite or jumps far above its recent past.

The numbers judged are a step's loss and its gradient's norm over all ranks, before clipping, against those
of the steps taken before. Every rank holds the same ones, so all decide alike and nobody asks; the past is
part of the stage's position (`loop.Position`) and so of its checkpoints: a resumed run decides alike, too.
"""

import math

LEAST_SPREAD = 0.1
"""Of the mean; a standard deviation counts as at least so much, or a very steady past makes spikes of noise."""


def why_bad(loss: float, norm: float, recent: list[list[float]], sigmas: float, window: int) -> str:
    """Why a step must not be taken, in words; empty where it may be.

    Args:
        recent: [loss, gradient norm] of the steps taken before; spikes are looked for once half a
            window is known.
        sigmas: a spike is so many standard deviations above the mean; 0: there are none.
    """
    for what, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            return f"{what} not finite"
    if not sigmas or 2 * len(recent) < window:
        return ""
    for index, (what, value) in enumerate((("loss", loss), ("gradient norm", norm))):
        past = [step[index] for step in recent]
        mean = math.fsum(past) / len(past)
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in past) / len(past))
        spread = max(spread, LEAST_SPREAD * abs(mean))
        if value > mean + sigmas * spread:
            return (
                f"{what} {value:.4g} is a spike: more than {sigmas:g} times {spread:.3g} above {mean:.4g}, "
                f"deviation and mean of the last {len(past)} steps"
            )
    return ""
