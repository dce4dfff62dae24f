"""What disks and strangers do to files."""

import random


def damaged(content: bytes, dice: random.Random) -> bytes:
    """``content`` with a bit turned, bytes cut off, put in or overwritten, at a random place."""
    changed, place = bytearray(content), dice.randrange(len(content))
    kind = dice.choice(["turn", "cut", "put in", "overwrite"])
    if kind == "turn":
        changed[place] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        del changed[place:]
    elif kind == "put in":
        changed[place:place] = dice.randbytes(9)
    else:
        changed[place : place + 40] = dice.randbytes(40)
    return bytes(changed)
