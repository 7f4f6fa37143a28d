"""Says what a training's devices did with their time, and what would make it faster."""

from infra.records import Record

MUCH_WAITING = 0.1
"""Share of the time from which on waiting is what to look at first."""

LITTLE_ARITHMETIC = 0.3
"""Share of the peak below which the network's layers are too small for the device."""


class Utilisation(Record):
    """Means over a training's steps, without validation, of all ranks; parts of one."""

    peak_share: float
    """Floating-point operations per second, of the ranks' peak: a large matrix product, measured when they started."""

    data_share: float
    """Time that ranks waited for images."""

    exchange_share: float
    """Time that ranks waited for others after their last gradient."""

    @property
    def line(self) -> str:
        """The shares and what to do about them, for people."""
        shares = (
            f"{self.peak_share:.0%} of the peak, {self.data_share:.0%} of the time waiting for images, "
            f"{self.exchange_share:.0%} for other ranks"
        )
        return f"{shares}: {self.advice}"

    @property
    def advice(self) -> str:
        """What to do to train faster."""
        if self.data_share > max(MUCH_WAITING, self.exchange_share):
            return "images come too slowly; data.encoding=raw, a larger cache or more cores for each rank would help"
        if self.exchange_share > MUCH_WAITING:
            return "look for a slow rank in train/rank_seconds_max; fewer ranks or a larger batch_size would help"
        if self.peak_share < LITTLE_ARITHMETIC:
            return "layers are small for the device; fewer lanes or a larger batch_size would help"
        return "the devices are busy; smaller images, a smaller network or more ranks would be faster"
