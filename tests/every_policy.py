"""Every policy of the package, and every setting that decides in another way."""

from functools import partial
from math import inf

from gradclip import (
    AGCClip,
    EMAClip,
    GuardClip,
    NormClip,
    ObserveClip,
    QuantileClip,
    Schedule,
    ValueClip,
    ZScoreClip,
    presets,
)

ADAPTIVE = {
    "zscore": ZScoreClip,
    "zscore by tensor": partial(ZScoreClip, scope="tensor"),
    "quantile": partial(QuantileClip, window=200, warmup=20),
    "quantile by tensor": partial(QuantileClip, scope="tensor", window=200, warmup=20),
    "ema": partial(EMAClip, scope="group"),
    "ema by tensor": EMAClip,
    "adagc": presets.adagc_paper,
    "autoclip": presets.autoclip,
    "zclip": presets.zclip_paper,
}
"""What makes each policy whose limit follows the norms."""
PAPERS = ("adagc", "autoclip", "zclip")
FOLLOWING = [name for name in ADAPTIVE if name not in PAPERS]
"""Those that clip seldom, and follow a level that has changed."""
SPIKING = {
    **ADAPTIVE,
    **{f"{name}, skip": partial(ADAPTIVE[name], on_spike="skip") for name in FOLLOWING},
}


def quick(policy):
    """Return a policy that knows after six norms what is usual, and follows in few steps."""
    fast = {"decay": 0.9, "window": 50, "warmup": min(6, policy.warmup), "q": 0.99}
    own = {name: value for name, value in fast.items() if name in type(policy).model_fields}
    return policy.model_copy(update=own)


FALLING = Schedule(points=((0, 1.5), (20, 0.5)), shape="linear")
BY_NORMS = {
    "norm": NormClip(max_norm=1.0),
    "norm by tensor": NormClip(max_norm=0.5, scope="tensor"),
    "norm, p = inf": NormClip(max_norm=0.5, norm_type=inf),
    "norm, skip_above": NormClip(max_norm=1.0, skip_above=20.0),
    "norm by tensor, skip_above": NormClip(max_norm=0.5, scope="tensor", skip_above=20.0),
    "skip_above alone": NormClip(max_norm=inf, skip_above=20.0),
    "schedule": NormClip(max_norm=FALLING),
    "schedule by tensor, skip_above": NormClip(max_norm=FALLING, scope="tensor", skip_above=20.0),
    "guard": GuardClip(),
    "observe": ObserveClip(),
    **{name: quick(make()) for name, make in SPIKING.items()},
}
"""What ``replay`` takes: norms tell all that these need."""
EVERY = {
    **BY_NORMS,
    "value": ValueClip(clip_value=0.3),
    "agc": AGCClip(),
    "patterns": {"a.*": quick(ZScoreClip(on_spike="skip")), "*": GuardClip()},
}
SKIPPING = [name for name in EVERY if "skip" in name or name == "patterns"]
