"""The order of the tests that start processes."""

LONGEST = ("test_suite", "test_clustering")


def pytest_collection_modifyitems(items):
    # First, so that none of them is left for the end, when nothing is there to run beside it.
    items.sort(key=lambda item: item.path.stem not in LONGEST)
