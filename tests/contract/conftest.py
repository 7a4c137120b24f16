"""What drivers import may not be installed, and they have no tests of their own."""

collect_ignore_glob = ["ways_by_*.py"]
