"""pytest's settings for what is timed."""


def pytest_xdist_auto_num_workers(config):
    """What is timed runs alone, in this process."""
    return 0
