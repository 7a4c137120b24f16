"""What a driver returns: the weights after each step, and what the way in told of them."""

from gradclip.diagnostics import read_header, read_norms, read_record


def told_by_record(folder):
    """Return what a record says of a run, by name."""
    steps = read_record(folder)
    last = steps[-1]
    told = {
        "steps": len(steps),
        "last step": last.step,
        "clipped": sum(step.clipped for step in steps),
        "skipped": sum(step.skipped for step in steps),
        "reasons": sum(step.reason == "nonfinite" for step in steps),
        "lr": last.lr,
        "norm_pre": last.norm_pre,
        "norm_post": last.norm_post,
    }
    if any(each["norms"] for each in read_header(folder)["optimizers"]):
        norms = read_norms(folder)
        told.update(zip(norms.names, norms.norms[-1].tolist(), strict=True))
    return told


class Trained(list):
    """The weights after each step.

    Args:
        weights: Of each step.
        stats: What the way in says that the steps came to; None where it has no object to ask.
        recorded: By name what its record says, where it was in another place than the test's.
        logged: By name what reached the first logger of the framework at its last log.
    """

    def __init__(self, weights, stats=None, logged=None, recorded=None):
        super().__init__(weights)
        self.recorded = recorded
        self.stats = stats
        self.logged = {} if logged is None else logged
