"""What messages are made of."""

import errno

import pytest

from awq2marlin.errors import _ADVICE, OutputError, problem_from_os_error, size_text
from awq2marlin.pipeline.output import as_output_errors


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


def test_a_library_that_cannot_be_loaded_is_no_fault_of_the_output_folder(tmp_path):
    """Llvmlite raises an OSError of its own words, without a number."""
    with pytest.raises(OutputError) as caught, as_output_errors(tmp_path):
        raise OSError("Could not load libllvmlite.so")
    assert str(caught.value) == "Could not load libllvmlite.so"
    with pytest.raises(OutputError, match="no space") as caught, as_output_errors(tmp_path):
        raise OSError(errno.ENOSR, "No space for streams")
    assert caught.value.problems[0].file == str(tmp_path)
