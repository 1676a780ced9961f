"""TODO training.flag_types."""

import logging
import math

logger = logging.getLogger("svd_xtend")


def number_or_word(word):
    """The type of a flag that is a number, or this word."""

    def number(text):
        return text if text == word else float(text)

    number.__name__ = f"number or {word}"  # argparse's error names it
    return number


def find_wrong_number(args, least):
    """What is wrong with a size, with one of {flag: its least value}, or with a rate, as an error; None where nothing is."""
    for flag in ("width", "height"):
        value = getattr(args, flag)
        if value % 8 or value <= 0:
            return f"--{flag} {value}: must be a multiple of 8; try {round(value / 8) * 8 or 8}"
    for flag, bound in least.items():
        value = getattr(args, flag, None)
        if value is not None and value < bound:
            return f"--{flag} {value}: must be at least {bound}"
    for flag in ("fps", "source_fps"):
        value = getattr(args, flag)
        if value not in (None, "native") and not 0 < value < math.inf:
            return f"--{flag} {value}: must be above 0"
