"""What messages are made of."""

import errno

import pytest

from awq2marlin.errors import _ADVICE, problem_from_os_error, size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
        (999_999_999, "1.0 GB"), (671_026_419_200, "671.0 GB"), (1_300_000_000_000, "1.3 TB"), (1e16, "10000.0 TB"),
    ],
)  # fmt: skip
def test_a_size_is_told_in_the_unit_that_fits_it(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize("number", _ADVICE, ids=errno.errorcode.get)
def test_what_the_system_refuses_is_told_with_what_to_do(number):
    problem = problem_from_os_error(OSError(number, "the system's words", "some/file"))
    assert problem.file == "some/file"
    assert ";" in problem.message
