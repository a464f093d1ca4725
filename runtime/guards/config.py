"""Which guards run, and how strict they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GuardConfig:
    """Which guards run, and how strict they are.

    Attributes:
        finite_and_range: Refuse NaN, infinity and values outside the specification's range.
        low_information: Flag inputs whose every channel is constant.
        frozen_after: Flag an input after this many repetitions of the same bytes; 0 switches the guards on streams
            off (frozen and torn frames), for samples that are not a stream.
        unusual_sigma: Warn when a statistic is this many calibration standard deviations off; 0 switches it off.
        refuse_sigma: Refuse the frame when one is so many off; 0 never refuses. The demo's clean frames reach 5.1 at
            most in 10,000; noise that costs it half of its accuracy begins at 14.
        outputs: Flag NaN and infinity in outputs, and warn of outputs outside the band of the calibration set.
        always_copy: Copy arrays that own their memory too, for callers whose threads write to them meanwhile.
        every_channel: Take the statistics of every channel in every frame, instead of a part in turn.
    """

    finite_and_range: bool = True
    low_information: bool = True
    frozen_after: int = 10
    unusual_sigma: float = 8.0
    refuse_sigma: float = 12.0
    outputs: bool = True
    always_copy: bool = False
    every_channel: bool = False


SAMPLES = GuardConfig(frozen_after=0, every_channel=True)  # for evaluation: samples repeat, a sensor must not
