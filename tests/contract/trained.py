"""What a driver returns: the weights after each step, and what the way in told of them."""


class Trained(list):
    """The weights after each step.

    Args:
        weights: Of each step.
        stats: What the way in says that the steps came to; None where it has no object to ask.
        logged: By name what reached the first logger of the framework at its last log.
    """

    def __init__(self, weights, stats=None, logged=None):
        super().__init__(weights)
        self.stats = stats
        self.logged = {} if logged is None else logged
