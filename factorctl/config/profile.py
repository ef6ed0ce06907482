"""The options of `factorctl profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from factorctl.config.common import CommonConfig, require_positive
from factorctl.config.shape import ScaleRule
from factorctl.errors import UsageError


@dataclass(frozen=True)
class ProfileConfig(CommonConfig):
    """`factorctl profile`."""

    checkpoint: Path | None = None
    """A native checkpoint; None means the newest in the workspace."""
    batch: tuple[int, ...] = (1, 8)
    prompt: tuple[int, ...] = (128, 512)
    decode_tokens: int = 8
    """Decoding steps after each prefill, each one a sample."""
    rounds: int = 10
    seconds: float = 60.0
    """Begin no further round of a regime after this long, once there are three."""
    top_k: int | None = None
    scale: ScaleRule | None = None
    data: str = "self"
    """Text that decides the routing: DATA, or `random` for random tokens."""
    text_field: str | None = None
    latency: bool = True
    sweep_k: bool = False
    """Also count the FLOPs of every other number of active experts."""
    tune: bool = False
    """Time the execution paths first, and cache what is fastest on this machine."""
    require_quiet: bool = False
    """Refuse to measure on a busy machine instead of marking the report."""
    html: Path | None = None
    plots: Path | None = None
    """Directory for the PNG files."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, values in (("--batch", self.batch), ("--prompt", self.prompt), ("--rounds", (self.rounds,))):
            if not values or min(values) < 1:
                listed = ",".join(str(value) for value in values) or "nothing"
                raise UsageError(f"{option} {listed} holds no positive numbers only", f"for example {option} 1,8")
        require_positive("--decode-tokens", self.decode_tokens, "try 8")
