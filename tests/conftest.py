"""Options of the test run."""

import pytest

pytest.register_assert_rewrite("learner_batch", "toy_rollout")  # their checks, as in a test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--forest-operations",
        type=int,
        default=100_000,
        help="random operations in the forest's property test",
    )


@pytest.fixture
def forest_operations(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--forest-operations"))
