"""One read of every gradient: sums by row, and the norms that policies see."""
