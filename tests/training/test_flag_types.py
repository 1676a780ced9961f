"""Flag types: what they accept, and the one line that argparse prints for everything else."""

import argparse

import pytest

from svd_xtend.training import flag_types

ACCEPTED = [
    (flag_types.positive_int, "1", 1),
    (flag_types.positive_int, "14", 14),
    (flag_types.non_negative_int, "0", 0),
    (flag_types.multiple_of_8, "8", 8),
    (flag_types.multiple_of_8, "576", 576),
    (flag_types.finite_float, "-1.5", -1.5),
    (flag_types.positive_float, "1e-5", 1e-5),
    (flag_types.non_negative_float, "0", 0.0),
    (flag_types.fraction, "0", 0.0),
    (flag_types.fraction, "1", 1.0),
    (flag_types.fraction_below_one, "0", 0.0),
    (flag_types.fraction_below_one, "0.99", 0.99),
    (flag_types.number_or_word("native"), "native", "native"),
    (flag_types.number_or_word("native"), "-7", -7.0),
    (flag_types.number_or_word("native", flag_types.positive_float), "7.5", 7.5),
]

REFUSED = [
    (flag_types.positive_int, "0", "expected a whole number of at least 1; got 0"),
    (flag_types.positive_int, "1.5", "expected a whole number of at least 1; got 1.5"),
    (flag_types.positive_int, "many", "expected a whole number of at least 1; got many"),
    (flag_types.non_negative_int, "-1", "expected a whole number of at least 0; got -1"),
    (flag_types.multiple_of_8, "325", "expected a multiple of 8, for example 328; got 325"),
    (flag_types.multiple_of_8, "-320", "expected a multiple of 8, for example 8; got -320"),
    (flag_types.multiple_of_8, "0", "expected a multiple of 8, for example 8; got 0"),
    (flag_types.multiple_of_8, "wide", "expected a multiple of 8, for example 320; got wide"),
    (flag_types.finite_float, "inf", "expected a number; got inf"),
    (flag_types.positive_float, "0", "expected a number above 0; got 0"),
    (flag_types.positive_float, "nan", "expected a number above 0; got nan"),
    (flag_types.positive_float, "inf", "expected a number above 0; got inf"),
    (flag_types.non_negative_float, "-0.1", "expected a number of at least 0; got -0.1"),
    (flag_types.fraction, "1.1", "expected a fraction from 0 to 1; got 1.1"),
    (flag_types.fraction, "-0.1", "expected a fraction from 0 to 1; got -0.1"),
    (flag_types.fraction, "nan", "expected a fraction from 0 to 1; got nan"),
    (flag_types.fraction_below_one, "1", "expected a fraction from 0 to less than 1; got 1"),
    (flag_types.number_or_word("auto"), "automatic", "expected a number, or auto; got automatic"),
    (
        flag_types.number_or_word("native", flag_types.positive_float),
        "0",
        "expected a number above 0, or native; got 0",
    ),
]


@pytest.mark.parametrize("flag_type, text, value", ACCEPTED)
def test_a_value_in_range_is_parsed(flag_type, text, value):
    parsed = flag_type(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("flag_type, text, message", REFUSED)
def test_a_value_out_of_range_is_one_error_that_names_the_flag(flag_type, text, message, capsys):
    parser = argparse.ArgumentParser(prog="train_svd.py")
    parser.add_argument("--flag", type=flag_type)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--flag={text}"])
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == f"train_svd.py: error: argument --flag: {message}"
