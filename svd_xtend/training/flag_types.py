"""Types for argparse flags that check the range of a number.

    parser.add_argument("--width", type=multiple_of_8, default=512)
    parser.add_argument("--fps", type=number_or_word("native", positive_float), default=7)

A value outside the range ends the script with one line that names the flag:

    train_svd.py: error: argument --width: expected a multiple of 8, for example 320; got 325

argparse applies a type to defaults that are strings, and not to numbers or None.
"""

import argparse
import math
from collections.abc import Callable


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1. Raise ArgumentTypeError if it is anything else."""
    value = parse_int(text)
    if value is None or value < 1:
        raise wrong_value("a whole number of at least 1", text)
    return value


def non_negative_int(text: str) -> int:
    """Parse a whole number of at least 0. Raise ArgumentTypeError if it is anything else."""
    value = parse_int(text)
    if value is None or value < 0:
        raise wrong_value("a whole number of at least 0", text)
    return value


def multiple_of_8(text: str) -> int:
    """Parse a positive multiple of 8. Raise ArgumentTypeError if it is anything else.

    The VAE of Stable Video Diffusion makes one latent pixel of 8 x 8 pixels.
    """
    value = parse_int(text)
    if value is None or value < 1 or value % 8 != 0:
        example = 320 if value is None else max(8, round(value / 8) * 8)
        raise wrong_value(f"a multiple of 8, for example {example}", text)
    return value


def finite_float(text: str) -> float:
    """Parse a finite number. Raise ArgumentTypeError if it is anything else."""
    value = parse_float(text)
    if value is None:
        raise wrong_value("a number", text)
    return value


def positive_float(text: str) -> float:
    """Parse a finite number above 0. Raise ArgumentTypeError if it is anything else."""
    value = parse_float(text)
    if value is None or value <= 0:
        raise wrong_value("a number above 0", text)
    return value


def non_negative_float(text: str) -> float:
    """Parse a finite number of at least 0. Raise ArgumentTypeError if it is anything else."""
    value = parse_float(text)
    if value is None or value < 0:
        raise wrong_value("a number of at least 0", text)
    return value


def fraction(text: str) -> float:
    """Parse a number from 0 to 1, both included. Raise ArgumentTypeError if it is anything else."""
    value = parse_float(text)
    if value is None or not 0 <= value <= 1:
        raise wrong_value("a fraction from 0 to 1", text)
    return value


def fraction_below_one(text: str) -> float:
    """Parse a number from 0 to below 1. Raise ArgumentTypeError if it is anything else."""
    value = parse_float(text)
    if value is None or not 0 <= value < 1:
        raise wrong_value("a fraction from 0 to less than 1", text)
    return value


def number_or_word(
    word: str, number: Callable[[str], float] = finite_float
) -> Callable[[str], float | str]:
    """Return a type for flags whose value is either a number or this one word.

    number: the type of this module that parses the number, for example `positive_float`.
    """

    def parse(text: str) -> float | str:
        if text == word:
            return word
        try:
            return number(text)
        except argparse.ArgumentTypeError as error:
            expected, _, got = str(error).rpartition("; got ")
            raise argparse.ArgumentTypeError(f"{expected}, or {word}; got {got}") from None

    return parse


def replace_args(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    """Return a copy of the flags with some of them resolved."""
    return argparse.Namespace(**{**vars(args), **changes})


def parse_int(text: str) -> int | None:
    """Return the whole number that a text holds, or None."""
    try:
        return int(text)
    except ValueError:
        return None


def parse_float(text: str) -> float | None:
    """Return the finite number that a text holds, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def wrong_value(expected: str, text: str) -> argparse.ArgumentTypeError:
    """Return the error that argparse prints behind the name of the flag."""
    return argparse.ArgumentTypeError(f"expected {expected}; got {text}")
