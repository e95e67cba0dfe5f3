"""Words for people."""


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts.

    >>> counted(1, "pass"), counted(12, "pass"), counted(0, "rank")
    ('1 pass', '12 passes', '0 ranks')
    """
    if number != 1:
        noun += "es" if noun.endswith("s") else "s"
    return f"{number} {noun}"
