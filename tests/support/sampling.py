"""Few cases that together have all that many have."""


def covering(values):
    """Few keys of {key: a set of values}, in their order, such that each value is in the set of one."""
    missing = set().union(*values.values())
    chosen = set()
    while missing:
        key = max(values, key=lambda key: len(values[key] & missing))
        missing -= values[key]
        chosen.add(key)
    return [key for key in values if key in chosen]
